"""What the services say to one another: one struct a message, one union a direction of a link.

They are `array_like`: the fields travel as an array, in the order written here. Token ids and
other arrays travel as raw little-endian int32 (`pack`, `unpack`). A link carries lists of these.

A request is known inside by its `uid` and its `attempt`. Uids are 63-bit numbers: an ingress counts
on from its incarnation in the upper 32 bits, which a uid does not show any more once the count has
carried over. The ingress submits a request again, with the next attempt, when a service died that
held it. A newer attempt replaces an older one everywhere; of an older one nothing is believed.
Offsets count from the first output token, so that what arrives twice is cut.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from nanovllm.names import ServiceId
from nanovllm.protocol import FinishReason, Reasoning, Sampling, StructuredOutputs, Usage

# NumPy would take a third of the time that most processes take to start. So only processes that
# compute import NumPy.
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def pack(values: Iterable[int] | NDArray[np.int32]) -> bytes:
    """Integers as little-endian int32."""
    return _packed("i", values)


def unpack(raw: bytes) -> NDArray[np.int32]:
    """The int32 that `pack` wrote, as a read-only array. Raises ValueError on a torn one."""
    import numpy as np

    return np.frombuffer(raw, dtype="<i4")


def unpack_list(raw: bytes) -> list[int]:
    """As `unpack`, without NumPy."""
    return _unpacked("i", raw)


def pack_int64(values: Iterable[int] | NDArray[np.int64]) -> bytes:
    """Integers, uids for one, as little-endian int64."""
    return _packed("q", values)


def unpack_int64(raw: bytes) -> list[int]:
    """The int64 that `pack_int64` wrote. Raises ValueError on a torn one."""
    return _unpacked("q", raw)


# An `array` has the byte order of the machine, which is little-endian wherever nanovllm runs.
def _packed(code: Literal["i", "q"], values: Iterable[int] | NDArray[Any]) -> bytes:
    if hasattr(values, "astype"):
        return values.astype(f"<{code}", copy=False).tobytes()
    return array(code, values).tobytes()


def _unpacked(code: Literal["i", "q"], raw: bytes) -> list[int]:
    numbers = array(code)
    numbers.frombytes(raw)
    return numbers.tolist()


class Message(msgspec.Struct, array_like=True, gc=False):
    """Base of everything that travels between services."""


class TokenLogprobs(Message):
    """Of one output token: itself first, then the likeliest. int32[k+1] and float32[k+1]."""

    token_ids: bytes
    values: bytes


class PromptPart(Message):
    """Log-probabilities of prompt tokens from index `first` on, `width` a token: itself first, then
    the likeliest. int32 and float32 [tokens * width]."""

    first: int
    width: int
    token_ids: bytes
    values: bytes


# ingress <-> tokenizer --------------------------------------------------------------------------


class Chat(Message):
    """What a chat template makes a prompt of."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    template_kwargs: dict[str, Any]
    continue_final_message: bool


class Tokenize(Message, tag="tokenize"):
    """A request as its client sent it. Exactly one of `prompt`, `prompt_token_ids` (int32) and
    `chat` is given; `resumed` (int32) are the output tokens that the client brings. `chat` is a
    `Chat` in MessagePack: decoded maps take up to 64 times their bytes."""

    uid: int
    prompt: str | None
    prompt_token_ids: bytes | None
    chat: bytes | None
    sampling: Sampling
    resumed: bytes
    reasoning: Reasoning | None = None


class AnswerMarks(Message):
    """Where the answer begins in the output: behind the token `close`, if the prompt ends inside
    reasoning (`reasons`) or the first output token that is not white space is `open`; else at the
    start. Where the prompt's last message `has_reasoned`, a grammar lets no reasoning begin."""

    open: int
    close: int
    reasons: bool
    has_reasoned: bool = False


class Tokenized(Message, tag="tokenized"):
    """The prompt in token ids (int32), and the request's sampling as it is to be run:
    `stop_token_ids` hold the end-of-sequence ids too, unless the request ignores them, and
    `max_tokens` is clipped so that prompt plus output fits `max_model_len`."""

    uid: int
    prompt: bytes
    sampling: Sampling
    answer_marks: AnswerMarks | None = None


class Refused(Message, tag="refused"):
    """The request cannot be served; `code` is one of the public protocol's."""

    uid: int
    code: Literal["invalid_request", "context_length_exceeded", "internal"]
    message: str


IngressToTokenizer = Tokenize
TokenizerToIngress = Tokenized | Refused


# ingress <-> scheduler --------------------------------------------------------------------------


class Held(Message, tag="held"):
    """All that this incarnation of the scheduler should have: int64[n] and int32[n]. The first
    message on every connection. The scheduler ends all else, and answers `Missing`."""

    uids: bytes
    attempts: bytes


class Submit(Message, tag="submit"):
    """A request in token ids: `prompt` and the `output` so far are int32, and the first `resumed`
    output tokens came from the client. Without `answer_marks` the answer is all output. `timed`:
    `Timings` are wanted."""

    uid: int
    attempt: int
    prompt: bytes
    output: bytes
    resumed: int
    sampling: Sampling
    cache_salt: str
    answer_marks: AnswerMarks | None = None
    timed: bool = False


class End(Message, tag="end"):
    """This attempt, and older ones, are not to be run any more: the request is over, or is to be
    submitted again later."""

    uid: int
    attempt: int


class Missing(Message, tag="missing"):
    """What `Held` named and the scheduler does not have: int64[n] and int32[n]."""

    uids: bytes
    attempts: bytes


class EngineState(Message, tag="engine_state"):
    """Whether the engine can start a request now (its worker group is there), its size, and where
    its scheduler binds for detokenizers."""

    ready: bool
    slots: int
    blocks: int
    block_size: int
    endpoint: str = ""


class InHand(Message):
    """The requests `uids` that a service works on. `alone`: the service works on one request, and
    certainly on no other."""

    uids: list[int]
    alone: bool


NOTHING_IN_HAND = InHand([], alone=False)


class Lost(Message, tag="lost"):
    """The link to this incarnation of a service is gone, and the service had these requests in
    hand. If the link is made again in the same incarnation, `Lost` comes again, with
    `NOTHING_IN_HAND`."""

    service: ServiceId
    incarnation: int
    in_hand: InHand


IngressToScheduler = Held | Submit | End
SchedulerToIngress = Missing | EngineState | Lost


# scheduler -> detokenizer -----------------------------------------------------------------------


EndReason = Literal[FinishReason, "not_finite", "no_token", "too_costly"]
"""Why an output ended; "not_finite": the logits of its next token are not; "no_token": the request
rules out every token that could come next; "too_costly": to follow its grammar takes too much
work."""


class TextOptions(Message):
    """Beside the tokens, all that the text of an output depends on.

    Stop strings are looked for in the text of the tokens after the first `min_tokens`. Without
    `answer_marks` the answer is all output.
    """

    stop: list[str] = []
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0
    answer_marks: AnswerMarks | None = None


class Timings(Message):
    """Of an attempt, in µs: how long it waited for a slot; from then on for its first token; and
    from then on until the scheduler found its end, if it has."""

    queue_us: int
    prefill_us: int
    decode_us: int | None = None


class Begin(Message, tag="begin"):
    """The whole of an attempt as the scheduler has it: what a detokenizer starts from.

    `Begin` may come again within the attempt (for a reborn detokenizer, after a link was made anew,
    when `cached_tokens` is known): then its fields replace those held, and tokens already held are
    cut. `output` (int32) starts at offset 0. The first `resumed` tokens came from the client: their
    text is not sent, and all of them count, also where the output ended among them.
    `token_logprobs` belong to the last tokens of `output`; an earlier attempt has delivered those
    of the tokens before.
    """

    uid: int
    attempt: int
    output: bytes
    resumed: int
    text: TextOptions
    prompt_tokens: int
    cached_tokens: int
    token_logprobs: list[TokenLogprobs]
    prompt_parts: list[PromptPart] = []
    timings: Timings | None = None


class NewTokens(Message, tag="new_tokens"):
    """One step's new token of each of n requests: one array a column, so that a step of many
    sequences costs the scheduler a few array operations.

    `uids` int64[n], the others int32[n]; `offsets` is the token's index in the output.
    `logprob_rows` (int32) names the rows that `logprobs` belong to.
    """

    uids: bytes
    attempts: bytes
    offsets: bytes
    token_ids: bytes
    logprob_rows: bytes
    logprobs: list[TokenLogprobs]


class Finished(Message, tag="finished"):
    """The output ended with its `completion_tokens`-th token. Comes after those tokens."""

    uid: int
    attempt: int
    reason: EndReason
    completion_tokens: int
    timings: Timings | None = None


SchedulerToDetokenizer = Begin | NewTokens | Finished | End


# ingress <-> detokenizer ------------------------------------------------------------------------


class Engines(Message, tag="engines"):
    """All engines that there are: the endpoint of each engine's scheduler, by the engine's number.
    Detokenizers connect to these."""

    endpoints: dict[int, str]


class Ending(Message):
    reason: EndReason
    usage: Usage


class Decoded(Message, tag="decoded"):
    """Output from `token_offset` (tokens) and `text_offset` (characters of the released text).

    `logprobs` is empty unless asked for, else one entry a token. `ending` is there on the last.
    `answer_at` is the number of characters of the released text before the answer, from the message
    on in which the answer begins; there only if the request has `answer_marks`.
    `prompt_parts`, if asked for, come with the output from token 0. `timings`, if wanted, come with
    each; without `decode_us` where a stop string ended the output.

    A detokenizer sends one for each token. So the sequences are tuples: each empty list would be
    one more object for the garbage collector.
    """

    uid: int
    attempt: int
    token_offset: int
    text_offset: int
    token_ids: bytes
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    ending: Ending | None
    answer_at: int | None = None
    prompt_parts: tuple[PromptPart, ...] = ()
    timings: Timings | None = None


IngressToDetokenizer = Engines
DetokenizerToIngress = Decoded


# scheduler <-> gpu_worker rank 0, and rank 0 -> the other ranks ----------------------------------


class GroupReady(Message, tag="group_ready"):
    """The worker group is loaded and drained; it waits for a `Reset`. Repeated until one comes."""

    num_blocks: int
    block_size: int


class Reset(Message, tag="reset"):
    """All slots are empty from here on; the next plan is number `number`."""

    number: int


class Prepare(Message, tag="prepare"):
    """Make the matcher of a sequence that waits for a slot: from its grammar and from the `output`
    (int32) so far. Answered by `Prepared`, once all ranks have the matcher. `number` is the
    matcher's, which no scheduler gives twice. `alone`: the matcher shares nothing, see
    `Grammars.matcher`."""

    number: int
    structured_outputs: StructuredOutputs
    output: bytes
    answer_marks: AnswerMarks | None
    alone: bool


class Prepared(Message, tag="prepared"):
    """The matcher is ready; `failed`: the grammar does not take the output, or costs too much."""

    number: int
    failed: bool


class Keep(Message, tag="keep"):
    """Of the matchers that are prepared or in preparation, only these (int64[n]) are needed."""

    numbers: bytes


class Admission(Message):
    """A sequence takes a slot.

    `tokens` (int32) are the prompt, of `prompt_tokens` tokens, and the output so far; `blocks`
    (int32) is the slot's block table so far. The KV of the first `computed` tokens is in these
    blocks already (prefix cache). `matcher` is the number of its matcher, if it has a grammar; the
    grammar itself is not in `sampling`.
    """

    slot: int
    tokens: bytes
    prompt_tokens: int
    blocks: bytes
    computed: int
    sampling: Sampling
    matcher: int | None = None


class StepPlan(Message, tag="step_plan"):
    """One step; carries only what changed. Applied in this order, then run as one batch. A plan
    without rows only releases slots.

    Attributes:
        number: consecutive within the scheduler's incarnation, from `Reset.number` on.
        release: int32[r], slots that are empty from here on.
        admit: sequences that take a slot.
        append: int32[a, 2], (slot, block): the block goes to the end of the slot's block table.
        prefill: int32[p, 3], (slot, start, length): compute the slot's tokens
            [start, start + length). The chunk that reaches the last token also samples.
        decode: int32[d], slots that decode: the input is the slot's last sampled token, which
            has not left the device; each samples.

    The result's rows are those of `decode`, in order, then those of the prefill chunks that
    sampled, in order. A sampled token's position (for its random stream) is its index in the
    sequence, prompt included.
    """

    number: int
    release: bytes
    admit: list[Admission]
    append: bytes
    prefill: bytes
    decode: bytes


class RowLogprobs(Message):
    row: int
    logprobs: TokenLogprobs


NO_TOKEN_LEFT = -2
TOO_COSTLY = -3


class StepResult(Message, tag="step_result"):
    """What step `number` sampled: int32[rows]; -1 for a row whose logits are not finite,
    NO_TOKEN_LEFT for one whose request rules out every token, TOO_COSTLY for one whose grammar
    takes too much work.
    `logprobs` for the rows that asked. `prompt_parts`: one for each prefill chunk of a sequence
    that asks for log-probabilities of its prompt, in the plan's order.

    `busy_us` is the time since the group's start for which the device had work, and `at_us` the
    time since the group's start, when this step ended; their differences give the device's load.
    """

    number: int
    token_ids: bytes
    logprobs: list[RowLogprobs]
    busy_us: int
    at_us: int
    prompt_parts: list[PromptPart] = []


SchedulerToWorker = Reset | Keep | Prepare | StepPlan
WorkerToScheduler = GroupReady | Prepared | StepResult
