/* A client of nanovllm's ingress in C: streams the completion of a prompt to stdout.
 *
 *     ./complete PROMPT [MAX_TOKENS [SEED]]
 *
 * NANOVLLM_ENDPOINT says where the pipeline serves, NANOVLLM_KEYS names this client's key file.
 * Ctrl-C aborts the request. Where the connection ends, the client connects again, and the output
 * goes on where it was.
 *
 * All that it takes is a DEALER socket and MessagePack maps; docs/protocol.md has every key.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <inttypes.h>
#include <msgpack.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <zmq.h>

#define HEARTBEAT_MS 1000        /* a connection that is silent for three of them has ended */
#define UNREACHABLE_MS 10000     /* without a connection for so long, there is no pipeline */
#define RECONNECT_MS 500
#define EXIT_INTERRUPTED 130

static const char *const ID = "completion";

static void fail(const char *what, const char *why) {
    fprintf(stderr, "complete: %s: %s\n", what, why);
    exit(EXIT_FAILURE);
}

static void check(bool succeeded, const char *what) {
    if (!succeeded) fail(what, zmq_strerror(zmq_errno()));
}

static int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static volatile sig_atomic_t interrupted;

static void on_interrupt(int number) {
    (void)number;
    interrupted = 1;
}

/* The request, with what has arrived of its output: all that is needed to go on. */
struct request {
    const char *prompt;
    uint64_t max_tokens;
    bool seeded; /* by the user, or by the ingress in `accepted` */
    int64_t seed;
    uint32_t *token_ids;
    size_t tokens, capacity;
};

static void add_token(struct request *request, uint32_t token_id) {
    if (request->tokens == request->capacity) {
        request->capacity = request->capacity ? 2 * request->capacity : 256;
        request->token_ids =
            realloc(request->token_ids, request->capacity * sizeof *request->token_ids);
        if (!request->token_ids) fail("no memory", "for the output");
    }
    request->token_ids[request->tokens++] = token_id;
}

/* Sending ----------------------------------------------------------------------------------- */

static void pack_text(msgpack_packer *packer, const char *text) {
    msgpack_pack_str(packer, strlen(text));
    msgpack_pack_str_body(packer, text, strlen(text));
}

/* Begins a message: a map with `more` keys beside its type and the request's id. */
static msgpack_packer begin(msgpack_sbuffer *buffer, const char *type, size_t more) {
    msgpack_packer packer;
    msgpack_sbuffer_init(buffer);
    msgpack_packer_init(&packer, buffer, msgpack_sbuffer_write);
    msgpack_pack_map(&packer, 2 + more);
    pack_text(&packer, "type");
    pack_text(&packer, type);
    pack_text(&packer, "id");
    pack_text(&packer, ID);
    return packer;
}

static void send_packed(void *socket, msgpack_sbuffer *buffer) {
    int sent = zmq_send(socket, buffer->data, buffer->size, ZMQ_DONTWAIT);
    check(sent >= 0, "a message cannot be sent");
    msgpack_sbuffer_destroy(buffer);
}

/* With the output so far as `resume_token_ids`. A seed makes it go on as it would have. */
static void send_request(void *socket, const struct request *request) {
    msgpack_sbuffer buffer;
    msgpack_packer packer = begin(&buffer, "generate", 3);
    pack_text(&packer, "prompt");
    pack_text(&packer, request->prompt);
    pack_text(&packer, "sampling");
    msgpack_pack_map(&packer, request->seeded ? 2 : 1);
    pack_text(&packer, "max_tokens");
    msgpack_pack_uint64(&packer, request->max_tokens);
    if (request->seeded) {
        pack_text(&packer, "seed");
        msgpack_pack_int64(&packer, request->seed);
    }
    pack_text(&packer, "resume_token_ids");
    msgpack_pack_array(&packer, request->tokens);
    for (size_t i = 0; i < request->tokens; i++)
        msgpack_pack_uint32(&packer, request->token_ids[i]);
    send_packed(socket, &buffer);
}

static void send_abort(void *socket) {
    msgpack_sbuffer buffer;
    begin(&buffer, "abort", 0);
    send_packed(socket, &buffer);
}

/* Receiving --------------------------------------------------------------------------------- */

/* The value of a key; nil where the map has no such key. */
static msgpack_object get(msgpack_object map, const char *key) {
    if (map.type == MSGPACK_OBJECT_MAP) {
        for (uint32_t i = 0; i < map.via.map.size; i++) {
            msgpack_object_kv pair = map.via.map.ptr[i];
            if (pair.key.type == MSGPACK_OBJECT_STR && pair.key.via.str.size == strlen(key) &&
                memcmp(pair.key.via.str.ptr, key, strlen(key)) == 0)
                return pair.val;
        }
    }
    return (msgpack_object){.type = MSGPACK_OBJECT_NIL};
}

static bool is(msgpack_object value, const char *text) {
    return value.type == MSGPACK_OBJECT_STR && value.via.str.size == strlen(text) &&
           memcmp(value.via.str.ptr, text, strlen(text)) == 0;
}

static void print(FILE *stream, msgpack_object value) {
    if (value.type == MSGPACK_OBJECT_STR)
        fwrite(value.via.str.ptr, 1, value.via.str.size, stream);
    fflush(stream);
}

/* Takes one message; true if it was the request's last. Keys that are not known are ignored. */
static bool take(struct request *request, msgpack_object message) {
    msgpack_object type = get(message, "type");
    if (is(type, "accepted")) {
        request->seeded = true;
        request->seed = get(message, "seed").via.i64;
    } else if (is(type, "delta")) {
        msgpack_object ids = get(message, "token_ids");
        if (ids.type == MSGPACK_OBJECT_ARRAY)
            for (uint32_t i = 0; i < ids.via.array.size; i++)
                add_token(request, (uint32_t)ids.via.array.ptr[i].via.u64);
        print(stdout, get(message, "text"));
    } else if (is(type, "finish")) {
        msgpack_object usage = get(message, "usage");
        fprintf(stderr, "\n[");
        print(stderr, get(message, "finish_reason"));
        fprintf(stderr, ": %" PRIu64 " + %" PRIu64 " tokens]\n",
                get(usage, "prompt_tokens").via.u64, get(usage, "completion_tokens").via.u64);
        return true;
    } else if (is(type, "error")) {
        fprintf(stderr, "complete: ");
        print(stderr, get(message, "message"));
        fprintf(stderr, "\n");
        exit(EXIT_FAILURE);
    }
    return false;
}

/* Takes what has arrived: a frame is an array of messages. True if the request is over. */
static bool receive(void *socket, struct request *request) {
    bool over = false;
    zmq_msg_t frame;
    zmq_msg_init(&frame);
    while (!over && zmq_msg_recv(&frame, socket, ZMQ_DONTWAIT) >= 0) {
        msgpack_unpacked unpacked;
        msgpack_unpacked_init(&unpacked);
        size_t size = zmq_msg_size(&frame);
        if (msgpack_unpack_next(&unpacked, zmq_msg_data(&frame), size, NULL) !=
                MSGPACK_UNPACK_SUCCESS ||
            unpacked.data.type != MSGPACK_OBJECT_ARRAY)
            fail("what answers is no pipeline", "a frame is not an array in MessagePack");
        for (uint32_t i = 0; i < unpacked.data.via.array.size; i++)
            over = take(request, unpacked.data.via.array.ptr[i]) || over;
        msgpack_unpacked_destroy(&unpacked);
    }
    zmq_msg_close(&frame);
    return over;
}

/* Connections ------------------------------------------------------------------------------- */

/* A session is one connection, so each gets a socket of its own: nothing that was meant for an
 * earlier session is sent in the next one. */
struct connection {
    void *socket, *monitor;
};

/* Sets the options of CURVE from a file that `nanovllm keygen` has made: NAME = "Z85 TEXT". */
static void use_keys(void *socket, const char *file) {
    static const struct {
        const char *name;
        int option;
    } KEYS[] = {{"server-key", ZMQ_CURVE_SERVERKEY},
                {"public-key", ZMQ_CURVE_PUBLICKEY},
                {"secret-key", ZMQ_CURVE_SECRETKEY}};
    char line[256], name[16], key[41];
    int found = 0;
    FILE *opened = fopen(file, "r");
    if (!opened) fail(file, strerror(errno));
    while (fgets(line, sizeof line, opened)) {
        if (sscanf(line, " %15[a-z-] = \"%40[^\"]\"", name, key) != 2) continue;
        for (size_t i = 0; i < sizeof KEYS / sizeof *KEYS; i++) {
            if (strcmp(name, KEYS[i].name) != 0) continue;
            check(zmq_setsockopt(socket, KEYS[i].option, key, strlen(key) + 1) == 0, file);
            found++;
        }
    }
    fclose(opened);
    if (found != 3) fail(file, "is no client's key: `nanovllm keygen DIR --client NAME` makes one");
}

static struct connection connect_to(void *context, const char *endpoint, const char *keys) {
    static const int none = 0, heartbeat = HEARTBEAT_MS, timeout = 3 * HEARTBEAT_MS;
    static int sockets;
    char events_at[32];
    snprintf(events_at, sizeof events_at, "inproc://events-%d", sockets++);
    struct connection made = {zmq_socket(context, ZMQ_DEALER), zmq_socket(context, ZMQ_PAIR)};
    check(made.socket && made.monitor, "no socket");
    zmq_setsockopt(made.socket, ZMQ_LINGER, &none, sizeof none);
    zmq_setsockopt(made.socket, ZMQ_RCVHWM, &none, sizeof none); /* stdout may be slow */
    zmq_setsockopt(made.socket, ZMQ_HEARTBEAT_IVL, &heartbeat, sizeof heartbeat);
    zmq_setsockopt(made.socket, ZMQ_HEARTBEAT_TIMEOUT, &timeout, sizeof timeout);
    if (keys && *keys && strncmp(endpoint, "tcp:", 4) == 0) use_keys(made.socket, keys);
    int events = ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_DISCONNECTED |
                 ZMQ_EVENT_HANDSHAKE_FAILED_AUTH | ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL;
    check(zmq_socket_monitor(made.socket, events_at, events) == 0, "no monitor");
    check(zmq_connect(made.monitor, events_at) == 0, "no monitor");
    check(zmq_connect(made.socket, endpoint) == 0, endpoint);
    return made;
}

static void disconnect(struct connection connection) {
    zmq_socket_monitor(connection.socket, NULL, 0);
    zmq_close(connection.monitor);
    zmq_close(connection.socket);
}

/* The event that the monitor has next, or 0. */
static uint16_t next_event(void *monitor) {
    uint8_t frame[6]; /* an event, and a value that no event needs here */
    uint16_t event = 0;
    char address[256];
    if (zmq_recv(monitor, frame, sizeof frame, ZMQ_DONTWAIT) < 0) return 0;
    memcpy(&event, frame, sizeof event);
    zmq_recv(monitor, address, sizeof address, 0);
    return event;
}

static const char WANTS_KEY[] = "wants a key (see NANOVLLM_KEYS), or is no pipeline";

/* Streams the completion; the exit code. */
static int complete(void *context, const char *endpoint, const char *keys,
                    struct request *request) {
    struct connection connection = connect_to(context, endpoint, keys);
    int64_t unreachable_at = now_ms() + UNREACHABLE_MS;
    const bool keyed = keys && *keys;
    bool connected = false, turned_away = false, aborted = false, over = false;
    send_request(connection.socket, request);
    while (!over) {
        zmq_pollitem_t items[] = {{connection.socket, 0, ZMQ_POLLIN, 0},
                                  {connection.monitor, 0, ZMQ_POLLIN, 0}};
        zmq_poll(items, 2, RECONNECT_MS); /* Ctrl-C ends the wait */
        if ((over = receive(connection.socket, request))) break;
        uint16_t event = next_event(connection.monitor);
        if (event == ZMQ_EVENT_HANDSHAKE_SUCCEEDED) {
            connected = true;
            turned_away = false;
        } else if (event == ZMQ_EVENT_DISCONNECTED) {
            turned_away = !connected;
            if (connected) {
                fprintf(stderr, "[disconnected; going on]\n");
                unreachable_at = now_ms() + UNREACHABLE_MS;
            }
            connected = false;
        } else if (event == ZMQ_EVENT_HANDSHAKE_FAILED_AUTH) {
            fail(endpoint, "does not take this client's key: was it taken back?");
        } else if (event) {
            fail(endpoint,
                 keyed ? "takes no keys (see NANOVLLM_KEYS), or is no pipeline" : WANTS_KEY);
        }
        if (interrupted && !connected) break; /* a request ends with its connection */
        if (interrupted && !aborted) {
            send_abort(connection.socket); /* the answer is a `finish` */
            aborted = true;
        }
        if (event == ZMQ_EVENT_DISCONNECTED) {
            disconnect(connection);
            nanosleep(&(struct timespec){.tv_nsec = RECONNECT_MS * 1000000L}, NULL);
            connection = connect_to(context, endpoint, keys);
            send_request(connection.socket, request);
        }
        if (!connected && now_ms() >= unreachable_at)
            fail(endpoint,
                 !turned_away ? "nothing answers"
                 : keyed ? "ends every connection: does NANOVLLM_KEYS name another pipeline's key?"
                         : WANTS_KEY);
    }
    disconnect(connection);
    return over && !aborted ? EXIT_SUCCESS : EXIT_INTERRUPTED;
}

int main(int count, char **words) {
    if (count < 2 || count > 4) {
        fprintf(stderr, "usage: %s PROMPT [MAX_TOKENS [SEED]]\n", words[0]);
        return 2;
    }
    const char *endpoint = getenv("NANOVLLM_ENDPOINT");
    struct request request = {.prompt = words[1], .max_tokens = 200};
    if (count > 2) request.max_tokens = strtoull(words[2], NULL, 10);
    if (count > 3) request.seed = strtoll(words[3], NULL, 10);
    request.seeded = count > 3;
    /* A second Ctrl-C ends the program at once. */
    struct sigaction action = {.sa_handler = on_interrupt, .sa_flags = (int)SA_RESETHAND};
    sigaction(SIGINT, &action, NULL);
    void *context = zmq_ctx_new();
    check(context != NULL, "no context");
    endpoint = endpoint && *endpoint ? endpoint : "tcp://127.0.0.1:5555";
    int code = complete(context, endpoint, getenv("NANOVLLM_KEYS"), &request);
    zmq_ctx_term(context);
    free(request.token_ids);
    return code;
}
