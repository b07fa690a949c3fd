"""Several tokens a call: the same tokens as with one a call."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from tiny_decoder import VOCAB, ByteTokenizer, TinyDecoder

from llmir_jax.errors import RequestError
from llmir_jax.runtime.engine import Engine
from llmir_jax.runtime.runner import MAX_STEPS
from llmir_jax.runtime.sampling import SamplingParams

TOKENIZER = ByteTokenizer(b"abcdefghijklmnopqrstuvwxyz .,!?" + "é€😀".encode())
SAMPLED = SamplingParams(max_tokens=30, temperature=0.9, top_k=40, top_p=0.95, seed=11, repetition_penalty=1.3)
GREEDY = SamplingParams(max_tokens=30)


@pytest.fixture(scope="module")
def single() -> Engine:
    return Engine(TinyDecoder(), tokenizer=TOKENIZER)


@pytest.fixture(scope="module")
def shared() -> Engine:
    """Any step here takes far less than a minute, so that a call has as many as it may."""
    engine = Engine(TinyDecoder(), tokenizer=TOKENIZER, burst=60)
    engine.warmup()
    engine.generate([[1], [2]], SamplingParams(max_tokens=4))  # the first call measures
    return engine


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    yield shared
    stats = shared.stats()
    assert (stats.num_running, stats.num_waiting, set(stats.pages_used)) == (0, 0, {0})


def prompts(seed: int, count: int = 5) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, rng.integers(1, 30)).tolist() for _ in range(count)]


def tokens_of(engine: Engine, asked: list[list[int]], params) -> list[list[int]]:
    return [output.token_ids for output in engine.generate(asked, params)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "params", [GREEDY, SAMPLED, replace(SAMPLED, temperature=0.0)], ids=["greedy", "sampled", "penalty"]
)
def test_the_same_tokens(single: Engine, engine: Engine, params: SamplingParams, seed: int):
    num_compilations = len(engine.compilations)
    assert tokens_of(engine, prompts(seed), params) == tokens_of(single, prompts(seed), params)
    assert len(engine.compilations) == num_compilations


def test_warmup_compiles_everything():
    engine = Engine(TinyDecoder(buckets=(2, 4, 16)), burst=60)
    compiled = engine.warmup()
    assert [c.bucket for c in compiled if c.program == "steps"] == [2, 4]  # no more than 4 sequences decode
    assert [c.bucket for c in compiled if c.program == "steps and samples"] == [2, 4]
    for params in (GREEDY, SAMPLED, replace(SAMPLED, logprobs=1)):
        engine.generate(prompts(0), params)
    assert engine.compilations == compiled


def test_requests_of_every_kind_in_one_batch(single: Engine, engine: Engine):
    kinds = [
        SamplingParams(max_tokens=9),
        SamplingParams(max_tokens=21, temperature=1.5, seed=1),
        SamplingParams(max_tokens=7, repetition_penalty=1.5, logprobs=3),
        SamplingParams(max_tokens=30, temperature=0.7, min_p=0.1, top_k=5, seed=2, repetition_penalty=0.8),
        SamplingParams(max_tokens=15, temperature=1.0, top_p=0.5, seed=3),
    ]
    assert tokens_of(engine, prompts(7), kinds) == tokens_of(single, prompts(7), kinds)


def test_how_many_tokens_a_call_has(engine: Engine):
    updates = list(engine.stream([[1, 2, 3]], SamplingParams(max_tokens=MAX_STEPS + 4)))
    # the first token comes with the prompt; no call has more than are wanted
    assert [len(update.token_ids) for update in updates] == [1, MAX_STEPS, 3]
    # each step's log-probabilities are wanted: one a call
    updates = list(engine.stream([[1, 2, 3]], SamplingParams(max_tokens=5, logprobs=2)))
    assert [len(update.token_ids) for update in updates] == [1] * 5
    # so little time that one step does not fit
    slow = Engine(TinyDecoder(), burst=1e-9)
    assert [len(u.token_ids) for u in slow.stream([[1, 2, 3]], SamplingParams(max_tokens=5))] == [1] * 5


def test_what_comes_after_the_end_is_thrown_away(single: Engine, engine: Engine):
    [plain] = single.generate([[5, 6]], replace(SAMPLED, seed=4))
    for index in (3, 9, 17):
        stop = plain.token_ids[index]
        params = replace(SAMPLED, seed=4, stop_token_ids=[stop])
        [output] = engine.generate([[5, 6]], params)
        assert output.token_ids == plain.token_ids[: plain.token_ids.index(stop) + 1]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert plain.text is not None
    params = replace(SAMPLED, seed=4, stop=[plain.text[7:10]])
    [output], [expected] = engine.generate([[5, 6]], params), single.generate([[5, 6]], params)
    assert (output.text, output.token_ids, output.stop_reason) == (
        expected.text,
        expected.token_ids,
        expected.stop_reason,
    )
    # the pages of the tokens after it are free, and others find nothing of them
    assert tokens_of(engine, prompts(1), SAMPLED) == tokens_of(single, prompts(1), SAMPLED)


def test_requests_that_come_while_others_run(single: Engine, engine: Engine):
    asked = prompts(3)
    alone = [tokens_of(single, [prompt], SAMPLED)[0] for prompt in asked]
    updates: dict[int, list[int]] = {}
    numbers = []
    for prompt in asked:
        numbers.append(engine.add_request(prompt, SAMPLED))
        for update in engine.step():
            updates.setdefault(update.request_id, []).extend(update.token_ids)
    while engine.has_requests:
        for update in engine.step():
            updates.setdefault(update.request_id, []).extend(update.token_ids)
    assert [updates[number] for number in numbers] == alone


def test_forks(single: Engine, engine: Engine):
    found = {}
    for served in (single, engine):
        parent = served.add_request([9, 8, 7], SAMPLED)
        outputs = {}
        while len(outputs) < 2:
            for update in served.step():
                if update.output is not None:
                    outputs[update.request_id] = update.output.token_ids
            if len(served._live) == 1 and not outputs:
                child = served.fork(parent, replace(SAMPLED, seed=5))
        found[served] = outputs[parent], outputs[child]
    # where the child begins is another place, what they share is the same
    assert found[single][0] == found[engine][0]
    assert found[engine][1][0] == found[engine][0][0] and len(found[engine][1]) == SAMPLED.max_tokens


def test_few_pages(single: Engine):
    """No page is left for all the tokens of a call: fewer are computed, and none is wrong."""
    engine = Engine(TinyDecoder(num_pages=(17, 17), buckets=(16,)), burst=60)
    for seed in range(3):
        assert tokens_of(engine, prompts(seed), GREEDY) == tokens_of(single, prompts(seed), GREEDY)
    assert set(engine.stats().pages_used) == {0}


def test_logits_that_are_not_numbers_end_the_request_and_no_other(single: Engine):
    model = TinyDecoder(buckets=(4,))
    engine = Engine(model, burst=60)
    [plain] = single.generate([[1, 2, 3]], GREEDY)
    bad = next(token for token in range(VOCAB) if token not in [*plain.token_ids, 1, 2, 3])
    other = next([i] for i in range(VOCAB) if bad in tokens_of(single, [[i]], GREEDY)[0][2:12])
    model.params["embed"] = model.params["embed"].at[bad].set(np.nan)
    good, ill = engine.add_request([1, 2, 3], GREEDY), engine.add_request(other, GREEDY)
    ends = {}
    while engine.has_requests:
        ends |= {u.request_id: u.output for u in engine.step() if u.output is not None}
    assert ends[ill].finish_reason == "error" and ends[good].token_ids == plain.token_ids


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", ["_call_burst", "_launch_burst", "_timed"])
def test_interrupts_leave_the_engine_usable(
    single: Engine, engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str, late: bool
):
    expected = tokens_of(single, prompts(2), SAMPLED)
    runner = engine._runner
    original, calls = getattr(runner, name), 0

    def interrupt(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 8 and not late:
            raise KeyboardInterrupt
        result = original(*args, **kwargs)
        if calls == 8:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runner, name, interrupt)
        for seed in range(2, 10):
            engine.generate(prompts(seed), SAMPLED)
    assert not engine.has_requests
    assert tokens_of(engine, prompts(2), SAMPLED) == expected


def test_a_burst_must_be_a_time() -> None:
    with pytest.raises(RequestError, match="burst = -1 cannot be used"):
        Engine(TinyDecoder(), burst=-1)
