"""Snapshots of requests in flight, so that a program that was killed goes on where the last one was taken.

A snapshot has each request's tokens so far and its seed, no pages: they are computed again from the tokens, as after a
preemption, and the tokens that follow are the ones that would have followed. They are kept by orbax, which writes whole
ones only, in several processes too; that they are gone on from is tested in one process.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmir_jax.errors import CheckpointError
from llmir_jax.runtime.outputs import TokenLogprobs
from llmir_jax.runtime.request import Request

KEPT = 2
"""Snapshots that stay: the last one, and the one before while that is written."""


class Snapshots:
    """The snapshots of one call of `generate`, in a folder of their own that all processes see.

    Args:
        folder: where they are; made if it is not there.
        every: calls of the device between two of them.

    Raises:
        CheckpointError: a folder that cannot be written.
    """

    def __init__(self, folder: str | Path, *, every: int = 64) -> None:
        logging.getLogger("absl").setLevel(logging.WARNING)  # orbax tells of every step it takes
        import orbax.checkpoint as ocp  # here, since it takes long to import

        self.folder = Path(folder).expanduser().absolute()
        self.every = every
        self._args = ocp.args
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot keep snapshots there: {error.strerror}") from None
        self._num_calls = 0
        self._step: int = self._manager.latest_step() or 0

    def restore(self, requests: Sequence[Request]) -> None:
        """Bring new requests to where the last snapshot has them, if there is one.

        Raises CheckpointError for a snapshot of other requests.
        """
        latest = self._manager.latest_step()
        if latest is None:
            return
        content: dict[str, Any] = self._manager.restore(latest, args=self._args.JsonRestore())
        found = content["requests"]
        if [entry["asked"] for entry in found] != [_asked(request) for request in requests]:
            raise CheckpointError(
                f"{self.folder}: its snapshot is of {len(found)} requests that are not these {len(requests)}, or with "
                "other sampling parameters: give another folder, or remove it"
            )
        for request, entry in zip(requests, found, strict=True):
            request.seed = entry["seed"]
            every = entry["logprobs"] or [None] * len(entry["tokens"])
            for token, logprobs in zip(entry["tokens"], every, strict=True):
                request.append(token, None if logprobs is None else _logprobs(logprobs))

    def take(self, requests: Sequence[Request]) -> None:
        """To be called after each call of the device: takes a snapshot every so many."""
        self._num_calls += 1
        if self._num_calls % self.every:
            return
        self._step += 1
        entries = [
            {
                "asked": _asked(request),
                "seed": request.seed,
                "tokens": request.tokens[request.num_prompt :],
                "logprobs": _as_data(request.logprobs(request.num_prompt)),
            }
            for request in requests
        ]
        self._manager.save(self._step, args=self._args.JsonSave({"requests": entries}))

    def finish(self) -> None:
        """All requests have ended: remove what is not needed any more."""
        for step in list(self._manager.all_steps()):
            self._manager.delete(step)
        self._manager.close()


def _asked(request: Request) -> dict[str, Any]:
    """The request as it was made, as JSON has it."""
    params = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(request.params).items()}
    return {"prompt": request.tokens[: request.num_prompt], "params": params}


def _as_data(logprobs: list[TokenLogprobs] | None) -> list[Any] | None:
    return None if logprobs is None else [[x.token_id, x.logprob, [list(pair) for pair in x.top]] for x in logprobs]


def _logprobs(data: list[Any]) -> TokenLogprobs:
    token_id, logprob, top = data
    return TokenLogprobs(token_id=token_id, logprob=logprob, top=tuple((i, p) for i, p in top))
