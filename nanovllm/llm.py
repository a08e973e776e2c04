"""`LLM`: offline generation with nano-vLLM's interface.

Behind an LLM is a pipeline of its own, or a pipeline that runs already.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Final, NotRequired, TypedDict, get_args, get_type_hints

import msgspec

from nanovllm.checkpoint import ModelConfig, resolve_model
from nanovllm.client.connection import Connection
from nanovllm.client.private_pipeline import PrivatePipeline
from nanovllm.client.requests import Prompt, generate_message
from nanovllm.client.results import Completion, PendingRequest, RequestError
from nanovllm.control import SchedulerStats
from nanovllm.plain import plain
from nanovllm.progress import GenerationBar, LoadingBar
from nanovllm.protocol import Generate, Logprobs
from nanovllm.sampling_params import SamplingParams
from nanovllm.settings import Settings, with_fitting_defaults
from nanovllm.wording import counted, key_and_reason

# Most unfinished requests besides the running: enough that a free slot always finds a next one.
WINDOW: Final = 2048
CONNECT_TIMEOUT_S: Final = 10.0
# The LLM's own pipeline is watched as a process, so silence may last.
PRIVATE_TIMEOUT_S: Final = 120.0
CHECK_PERIOD_S: Final = 0.5
READY_PERIOD_S: Final = 0.05
_NOT_OPTIONS: Final = frozenset({"model", "runtime_dir"})


class LLMOutput(TypedDict):
    """What `LLM.generate` returns for a prompt; `logprobs` is there only if asked for."""

    text: str
    token_ids: list[int]
    logprobs: NotRequired[Logprobs]


class LLM:
    """Generates for many prompts at once.

    An LLM launches a pipeline of its own, which ends with the LLM and with its program, or uses a
    running pipeline. An LLM belongs to one thread.

    Args:
        model: checkpoint directory or hub id (downloaded, unless it is in the cache); "" is the
            small demo model.
        endpoint: use the pipeline that serves here, instead of launching one.
        options: of the pipeline to launch, by the names of `Settings`: `tensor_parallel_size`,
            `max_model_len`, `enforce_eager`, `gpu_memory_utilization`, …

    Raises:
        TypeError: an option that does not exist.
        ValueError: an option's value is not valid, or there is no such model.
        RuntimeError: the pipeline could not be launched; the message says why.
        PipelineUnavailable: nothing answers at `endpoint`.
    """

    def __init__(self, model: str = "", *, endpoint: str | None = None, **options: Any) -> None:
        if endpoint is not None:
            if model or options:
                given = ", ".join(["model"] * bool(model) + list(options))
                raise TypeError(f"a running pipeline (endpoint) has its own options; drop {given}")
            self._pipeline = None
            self._window = WINDOW
            self._connection = Connection(endpoint, CONNECT_TIMEOUT_S)
        else:
            settings = _settings(model, options)
            self._pipeline = PrivatePipeline(settings)
            room = max(1, settings.max_pending_requests // 2)  # of one session
            self._window = min(WINDOW + settings.max_num_seqs, room)
            self._connection = Connection(self._pipeline.endpoint, PRIVATE_TIMEOUT_S)
        self._tokens = 0  # in the outputs of all earlier calls
        self._closing = weakref.finalize(self, _close, self._connection, self._pipeline)
        try:
            self._wait_until_it_serves()
        except BaseException:
            self.exit()
            raise

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[LLMOutput]:
        """Generates for every prompt.

        Args:
            prompts: a list of texts, of lists of token ids, or of lists of chat messages; or one
                text.
            sampling_params: for all prompts, or a list with one for each.
            use_tqdm: draw a progress bar.

        Returns:
            One output a prompt, in their order.

        Raises:
            TypeError, ValueError: a prompt or parameter is not valid; nothing was generated.
            RequestError: the pipeline refused a prompt; its message tells which.
            PipelineUnavailable, RuntimeError: the pipeline is gone, or was left by `exit`.
        """
        if not self._closing.alive:
            raise RuntimeError("the LLM is closed")
        waiting = self._messages(_as_list(prompts), sampling_params)
        index_of = {message.id: index for index, message in enumerate(waiting)}
        outputs: list[LLMOutput | None] = [None] * len(waiting)
        outstanding: set[PendingRequest] = set()
        with GenerationBar(len(waiting), self._generated, self._tokens, shown=use_tqdm) as progress:
            try:
                while waiting or outstanding:
                    self._submit(waiting, outstanding)
                    for request in self._ended(outstanding):
                        index = index_of[request.message.id]
                        completion = _result(request, index)
                        outputs[index] = _output(completion)
                        progress.done(len(completion.token_ids))
                    progress.tick()
            finally:
                for request in outstanding:
                    self._connection.core.abandon(request)
                if self._closing.alive and outstanding:
                    self._connection.pump()
        self._tokens += progress.tokens
        return [output for output in outputs if output is not None]

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

    def _messages(self, prompts: Sequence[Prompt], sampling_params: Any) -> deque[Generate]:
        if isinstance(sampling_params, Sequence) and not isinstance(sampling_params, str):
            params: Sequence[SamplingParams | None] = sampling_params
            if len(params) != len(prompts):
                raise ValueError(
                    f"{counted(len(prompts), 'prompt')} but {len(params)} sampling_params: give one"
                    " for each, or a single one for all"
                )
        else:
            params = [sampling_params] * len(prompts)
        messages: deque[Generate] = deque()
        for index, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
            request_id = self._connection.core.new_id()
            try:
                messages.append(generate_message(request_id, prompt, sampling, stream=False))
            except (TypeError, ValueError) as error:
                part = isinstance(prompt, Integral | Mapping)
                hint = "; one prompt alone goes into a list, too: [prompt]" * part
                raise type(error)(f"prompts[{index}]: {error}{hint}") from None
        return messages

    def _submit(self, waiting: deque[Generate], outstanding: set[PendingRequest]) -> None:
        while waiting and len(outstanding) < self._window:
            outstanding.add(self._connection.core.submit(waiting.popleft(), patient=True))

    def _ended(self, outstanding: set[PendingRequest]) -> list[PendingRequest]:
        """Waits for a while; takes the requests that have ended out of `outstanding`."""
        changed = self._connection.wait(CHECK_PERIOD_S)
        if not changed and self._pipeline is not None:
            self._pipeline.check()
        ended = [p for p in changed if isinstance(p, PendingRequest) and p.ended]
        outstanding.difference_update(ended)
        return ended

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
                ping = self._connection.core.ping()
                while not ping.ended:
                    self._connection.wait(CHECK_PERIOD_S)
                    if self._pipeline is not None:
                        self._pipeline.check(launching=True)
                        bar.show(self._pipeline.services())
                if self._pipeline is None:
                    ping.result()
                    return
                # Its own pipeline may be silent for as long as the launcher lets it start.
                if ping.answer is not None and ping.answer.ready:
                    return
                self._connection.wait(READY_PERIOD_S)


def _as_list(prompts: str | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes | Mapping):
        raise TypeError(f"prompts is a list of prompts, or one text, not {type(prompts).__name__}")
    return list(prompts)


def _settings(model: str, options: dict[str, Any]) -> Settings:
    known = set(Settings.__struct_fields__) - _NOT_OPTIONS
    for name in options:
        if name not in known:
            raise TypeError(f"LLM has no option {name!r}; there are {', '.join(sorted(known))}")
    values = {"ingress": "", "log_level": "warning", **options, "model": str(model)}
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


def _result(request: PendingRequest, index: int) -> Completion:
    try:
        return request.result()
    except RequestError as error:
        raise RequestError(error.code, f"prompts[{index}]: {error.message}") from None


def _output(completion: Completion) -> LLMOutput:
    output = LLMOutput(text=completion.text, token_ids=completion.token_ids)
    if completion.logprobs is not None:
        output["logprobs"] = completion.logprobs
    return output


def _close(connection: Connection, pipeline: PrivatePipeline | None) -> None:
    connection.close()
    if pipeline is not None:
        pipeline.close()
