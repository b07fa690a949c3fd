"""Snapshots of requests in flight, so that a program that was killed goes on where the last one was taken.

A snapshot has each request's tokens so far and its seed, no pages: they are computed again from the tokens, as after a
preemption, and the tokens that follow are the ones that would have followed. Orbax keeps them, and only whole ones. Of
several processes, which all have the same requests, process 0 writes them, and tells the others what it has read.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmir_jax.errors import CheckpointError
from llmir_jax.processes import broadcast_text, is_first
from llmir_jax.runtime.outputs import TokenLogprobs
from llmir_jax.runtime.request import Request

KEPT = 2
"""Snapshots that stay: the last one, and the one before while that is written."""
EVERY = 5.0
"""Seconds between two of them: what is lost at most, and far more than writing one takes."""


class Snapshots:
    """The snapshots of one call of `generate` or `stream`, in a folder of their own.

    Args:
        folder: where they are, for process 0; made if it is not there.
        every: seconds between two of them.

    Raises:
        CheckpointError: a folder that cannot be written.
    """

    def __init__(self, folder: str | Path, *, every: float = EVERY) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.every = every
        self._manager = self._open() if is_first() else None
        self._taken_at = time.monotonic()
        self._step: int = 0 if self._manager is None else self._manager.latest_step() or 0

    def _open(self) -> Any:
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells of every step, and of what a kill has left
        import orbax.checkpoint as ocp  # here, since it takes long to import

        self._args = ocp.args
        alone = ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes={0}, barrier_sync_key_prefix="llmir_snapshots"
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, enable_async_checkpointing=False, create=False, multiprocessing_options=alone
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise self._cannot_keep(error) from None

    def _cannot_keep(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.folder}: cannot keep snapshots there: {error.strerror or error}")

    def restore(self, requests: Sequence[Request]) -> None:
        """Bring new requests to where the last snapshot has them, if there is one.

        Raises CheckpointError for a snapshot of other requests.
        """
        text = broadcast_text(json.dumps(self._read()))
        content: dict[str, Any] | None = json.loads(text)
        if content is None:
            return
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

    def _read(self) -> Any:
        """The last snapshot, in process 0; None if there is none."""
        latest = None if self._manager is None else self._manager.latest_step()
        if self._manager is None or latest is None:
            return None
        return self._manager.restore(latest, args=self._args.JsonRestore())

    def take(self, requests: Sequence[Request]) -> None:
        """To be called after each call of the device: takes a snapshot if it is time.

        Raises CheckpointError if it cannot be written.
        """
        if self._manager is None or time.monotonic() < self._taken_at + self.every:
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
        try:
            self._manager.save(self._step, args=self._args.JsonSave({"requests": entries}))
        except OSError as error:
            raise self._cannot_keep(error) from None
        self._taken_at = time.monotonic()

    def finish(self) -> None:
        """All requests have ended: remove what is not needed any more."""
        if self._manager is None:
            return
        for step in sorted(self._manager.all_steps()):
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
