"""`LLM`: offline generation with nano-vLLM's interface.

Behind an LLM is a pipeline of its own, or a pipeline that runs already.
"""

from __future__ import annotations

import contextlib
import queue
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    Literal,
    Unpack,
    cast,
    get_args,
    get_type_hints,
    overload,
)

import msgspec

from nanovllm.checkpoint import ModelConfig, resolve_model
from nanovllm.client.private_pipeline import PrivatePipeline
from nanovllm.client.requests import Messages, Prompt, Tools, generate_message
from nanovllm.client.results import PendingPing, PendingRequest, RequestError
from nanovllm.client.thread import ConnectionThread
from nanovllm.control import SchedulerStats
from nanovllm.llm_options import LLMOptions
from nanovllm.llm_requests import LLMOutput, as_list, asks_for, output_of
from nanovllm.plain import plain
from nanovllm.progress import GenerationBar, LoadingBar
from nanovllm.protocol import Generate
from nanovllm.sampling_params import SamplingParams
from nanovllm.settings import Settings, with_fitting_defaults
from nanovllm.wording import did_you_mean, key_and_reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Most unfinished requests besides the running: enough that a free slot always finds a next one.
WINDOW: Final = 2048
# The pipeline is sent so many requests at once, and computes them while others are encoded.
SENT_AT_ONCE: Final = 64
CONNECT_TIMEOUT_S: Final = 10.0
# The LLM's own pipeline is watched as a process, so silence may last.
PRIVATE_TIMEOUT_S: Final = 120.0
CHECK_PERIOD_S: Final = 0.5
READY_PERIOD_S: Final = 0.05


class LLM:
    """Generates for many prompts at once.

    An LLM launches a pipeline of its own, which ends with the LLM and with its program, or uses a
    running pipeline. Any number of threads may use an LLM; a forked process makes one of its own.

    Args:
        model: checkpoint directory or hub id (downloaded, unless it is in the cache); "" is the
            small demo model.
        endpoint: use the pipeline that serves here, instead of launching one; where it takes TCP
            connections with keys only, the variable NANOVLLM_KEYS names a client's key file.
        options: of the pipeline to launch, see `LLMOptions`.

    Raises:
        TypeError: an option that does not exist.
        ValueError: an option's value is not valid, or there is no such model.
        RuntimeError: the pipeline could not be launched; the message says why.
        PipelineUnavailable: nothing answers at `endpoint`.
    """

    def __init__(
        self, model: str = "", *, endpoint: str | None = None, **options: Unpack[LLMOptions]
    ) -> None:
        if endpoint is not None:
            if model or options:
                given = ", ".join(["model"] * bool(model) + list(options))
                raise TypeError(f"a running pipeline (endpoint) has its own options; drop {given}")
            self._pipeline = None
            self._model: str | None = None
            self._window = WINDOW
            self._thread = ConnectionThread(endpoint, CONNECT_TIMEOUT_S)
        else:
            settings = _settings(model, options)
            self._pipeline = PrivatePipeline(settings)
            self._model = settings.model
            room = max(1, settings.max_pending_requests // 2)  # of one session
            self._window = min(WINDOW + settings.max_num_seqs, room)
            self._thread = ConnectionThread(self._pipeline.endpoint, PRIVATE_TIMEOUT_S)
        self._tokens = 0  # in the outputs of all earlier calls
        self._closing = weakref.finalize(self, _close, self._thread, self._pipeline)
        try:
            self._wait_until_it_serves()
        except BaseException:
            self.exit()
            raise

    @overload
    def generate(
        self,
        prompts: str | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        return_errors: Literal[False] = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Tools | None = None,
    ) -> list[LLMOutput]: ...

    @overload
    def generate(
        self,
        prompts: str | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        return_errors: Literal[True],
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Tools | None = None,
    ) -> list[LLMOutput | RequestError]: ...

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        return_errors: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Tools | None = None,
    ) -> list[LLMOutput] | list[LLMOutput | RequestError]:
        """Generates for every prompt.

        Args:
            prompts: a list of texts, of lists of token ids, or of lists of chat messages; or one
                text.
            sampling_params: for all prompts, or a list with one for each.
            use_tqdm: draw a progress bar.
            return_errors: whether the RequestError of a prompt stands in the place of its output,
                instead of being raised; the other prompts then have theirs.
            chat_template_kwargs, tools: for prompts of chat messages, see `Client.generate`.

        Returns:
            One output a prompt, in their order; with `SamplingParams.n` so many, one after another.

        Raises:
            TypeError, ValueError: a prompt (unless errors are returned) or a parameter is not
                valid; nothing was generated.
            RequestError: the pipeline refused a prompt; its message tells which. The rest is
                aborted.
            PipelineUnavailable, RuntimeError: the pipeline is gone, or was left by `exit`.
        """
        if not self._closing.alive:
            raise RuntimeError("the LLM is closed")
        self._thread.connection.check_process()
        ask = partial(
            generate_message, stream=False, chat_template_kwargs=chat_template_kwargs, tools=tools
        )
        asks = asks_for(as_list(prompts), sampling_params, ask, return_errors)
        outputs: dict[int, LLMOutput | RequestError] = {}
        waiting: deque[tuple[int, Generate]] = deque()
        for index, (_, message) in enumerate(asks):
            if isinstance(message, RequestError):
                outputs[index] = message
            else:
                waiting.append((index, message))
        outstanding: dict[int, PendingRequest] = {}
        changed: queue.SimpleQueue[int] = queue.SimpleQueue()
        with GenerationBar(len(waiting), self._generated, self._tokens, shown=use_tqdm) as progress:
            try:
                while waiting or outstanding:
                    self._submit(waiting, outstanding, changed)
                    for index in self._ended(outstanding, changed):
                        outputs[index] = output = output_of(
                            outstanding.pop(index), asks[index].prompt
                        )
                        if not isinstance(output, RequestError):
                            progress.done(len(output["token_ids"]))
                        elif return_errors:
                            progress.done(0)
                        else:
                            raise output
                    progress.tick()
            finally:
                self._thread.abandon(*outstanding.values())
        self._tokens += progress.tokens
        return [outputs[index] for index in range(len(outputs))]

    def chat(
        self,
        messages: str | Messages | Sequence[str | Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Tools | None = None,
    ) -> list[LLMOutput]:
        """`generate` for one chat, or for a list of chats; arguments and errors as there. A text is
        a chat of one message, the user's."""
        one = isinstance(messages, str) or (bool(messages) and isinstance(messages[0], Mapping))
        chats = cast("Sequence[str | Messages]", [messages] if one else messages)
        return self.generate(
            [[{"role": "user", "content": c}] if isinstance(c, str) else c for c in chats],
            sampling_params,
            use_tqdm,
            chat_template_kwargs=chat_template_kwargs,
            tools=tools,
        )

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer, by transformers.

        Raises RuntimeError if the LLM uses a running pipeline, whose files it does not know.
        """
        if self._model is None:
            raise RuntimeError("a running pipeline's tokenizer is not known here; load it yourself")
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self._model)
        return tokenizer

    def exit(self) -> None:
        """Ends its own pipeline, or disconnects from a running one."""
        self._closing()

    def close(self) -> None:
        """The same as `exit`."""
        self._closing()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.exit()

    def _submit(
        self,
        waiting: deque[tuple[int, Generate]],
        outstanding: dict[int, PendingRequest],
        changed: queue.SimpleQueue[int],
    ) -> None:
        """Moves requests from `waiting` to `outstanding`; their changes go into `changed`."""
        while (room := min(len(waiting), self._window - len(outstanding))) > 0:
            new: list[PendingRequest] = []
            for _ in range(min(room, SENT_AT_ONCE)):
                index, message = waiting.popleft()
                request = PendingRequest(message, partial(changed.put, index), patient=True)
                outstanding[index] = request
                new.append(request)
            self._thread.submit(*new)

    def _ended(
        self, outstanding: dict[int, PendingRequest], changed: queue.SimpleQueue[int]
    ) -> list[int]:
        """The requests in `outstanding` that have ended; waits for a change, but not for long."""
        try:
            indices = {changed.get(timeout=CHECK_PERIOD_S)}
        except queue.Empty:
            if self._pipeline is not None:
                self._pipeline.check()
            return []
        while not changed.empty():
            indices.add(changed.get())
        return [i for i in indices if i in outstanding and outstanding[i].ended]

    def _generated(self) -> int:
        """The tokens that its own pipeline has generated, as of the latest report; 0 if it uses a
        running one."""
        services = [] if self._pipeline is None else self._pipeline.services()
        reports = [service.stats for service in services]
        return sum(stats.generated for stats in reports if isinstance(stats, SchedulerStats))

    def _wait_until_it_serves(self) -> None:
        """Returns when its own pipeline is ready, or a running one has answered."""
        with LoadingBar() as bar:
            while True:
                answered: queue.SimpleQueue[None] = queue.SimpleQueue()
                ping = PendingPing(partial(answered.put, None))
                self._thread.submit(ping)
                while not ping.ended:
                    with contextlib.suppress(queue.Empty):
                        answered.get(timeout=CHECK_PERIOD_S)
                    if self._pipeline is not None:
                        self._pipeline.check(launching=True)
                        bar.show(self._pipeline.services())
                if self._pipeline is None:
                    ping.result()
                    return
                # Its own pipeline may be silent for as long as the launcher lets it start.
                if ping.answer is not None and ping.answer.ready:
                    return
                time.sleep(READY_PERIOD_S)


def _settings(model: str, options: LLMOptions) -> Settings:
    known = LLMOptions.__annotations__
    for name in options:
        if name not in known:
            raise TypeError(f"LLM has no option {name!r}; {did_you_mean(name, known)}")
    values: dict[str, Any] = {"ingress": "", "log_level": "warning", **options, "model": str(model)}
    try:
        settings = msgspec.convert(with_fitting_defaults(plain(values)), Settings)
    except msgspec.ValidationError as error:
        name, reason = key_and_reason(error)
        if choices := get_args(get_type_hints(Settings).get(name)):
            reason = f"one of {', '.join(choices)}"
        raise ValueError(f"{name}={values[name]!r}: {reason}" if name else reason) from None
    # A download here shows its progress; the launcher's would not be seen.
    directory = resolve_model(settings.model)
    ModelConfig.from_checkpoint(directory)
    return msgspec.structs.replace(settings, model=str(directory))


def _close(thread: ConnectionThread, pipeline: PrivatePipeline | None) -> None:
    thread.close()
    if pipeline is not None:
        pipeline.close()
