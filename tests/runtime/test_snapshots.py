"""Requests that were cut off go on from their last snapshot, with the tokens that would have followed."""

from pathlib import Path

import pytest
from tiny_decoder import TinyDecoder

from llmir_jax.errors import CheckpointError
from llmir_jax.runtime.engine import Engine
from llmir_jax.runtime.request import Request
from llmir_jax.runtime.sampling import SamplingParams
from llmir_jax.runtime.snapshots import Snapshots

PROMPTS = [[5, 6, 7], list(range(20)), [42] * 7]
PARAMS = [
    SamplingParams(max_tokens=20),
    SamplingParams(max_tokens=14, temperature=0.9, seed=3, logprobs=2),
    SamplingParams(max_tokens=3),
]


class Killed(Exception):
    """Stands for the end of the process."""


class KilledAfter(Snapshots):
    """Snapshots of a process that does not live long."""

    calls_left = 9

    def take(self, requests: list[Request]) -> None:
        super().take(requests)
        self.calls_left -= 1
        if not self.calls_left:
            raise Killed


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(TinyDecoder())


def test_a_new_start_goes_on(engine: Engine, tmp_path: Path):
    whole = engine.generate(PROMPTS, PARAMS)
    with pytest.raises(Killed):
        engine.generate(PROMPTS, PARAMS, snapshots=KilledAfter(tmp_path, every=0))
    (tmp_path / "10.orbax-checkpoint-tmp").mkdir()  # of one that was being written
    calls: list[int] = []

    class Counted(Snapshots):
        def take(self, requests: list[Request]) -> None:
            calls.append(requests[0].num_generated)
            super().take(requests)

    resumed = engine.generate(PROMPTS, PARAMS, snapshots=Counted(tmp_path, every=0))
    assert [output.token_ids for output in resumed] == [output.token_ids for output in whole]
    assert resumed[1].logprobs is not None and whole[1].logprobs is not None
    for ours, theirs in zip(resumed[1].logprobs, whole[1].logprobs, strict=True):
        assert ours.token_id == theirs.token_id
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    assert calls[0] > 4, "the first request had some of its tokens already"
    again = engine.generate(PROMPTS, PARAMS, snapshots=Snapshots(tmp_path))  # nothing is left of it
    assert [output.token_ids for output in again] == [output.token_ids for output in whole]


def test_a_stream_begins_with_what_was_there(engine: Engine, tmp_path: Path):
    (whole,) = engine.generate(PROMPTS[:1], PARAMS[0])
    with pytest.raises(Killed):
        engine.generate(PROMPTS[:1], PARAMS[0], snapshots=KilledAfter(tmp_path, every=0))
    first, *others = engine.stream(PROMPTS[:1], PARAMS[0], snapshots=Snapshots(tmp_path))
    assert len(first.token_ids) == 9
    assert [*first.token_ids, *(token for update in others for token in update.token_ids)] == whole.token_ids
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_before_it_is_time(engine: Engine, tmp_path: Path):
    with pytest.raises(Killed):
        engine.generate(PROMPTS[:1], PARAMS[0], snapshots=KilledAfter(tmp_path, every=3600))
    assert not list(tmp_path.iterdir())


def test_a_snapshot_of_other_requests_is_refused(engine: Engine, tmp_path: Path):
    with pytest.raises(Killed):
        engine.generate(PROMPTS, PARAMS, snapshots=KilledAfter(tmp_path, every=0))
    with pytest.raises(CheckpointError, match="its snapshot is of 3 requests that are not these 1"):
        engine.generate(PROMPTS[:1], PARAMS[0], snapshots=Snapshots(tmp_path))


def test_a_folder_that_cannot_be(engine: Engine, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot keep snapshots there"):
        Snapshots(tmp_path / "file" / "folder")
