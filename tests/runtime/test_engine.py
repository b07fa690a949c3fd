"""The engine over a hand-written paged decoder: its tokens are those of the same model without a cache."""

import gc
import logging
import weakref
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from tiny_decoder import VOCAB, ByteTokenizer, TinyDecoder, assert_greedy, reference_logits

from llmir_jax.errors import LlmirError, OutOfPagesError, RequestError
from llmir_jax.runtime.engine import Engine
from llmir_jax.runtime.outputs import RequestUpdate
from llmir_jax.runtime.sampling import SamplingParams

PROMPTS = [[5], [1, 2, 3], list(range(20)), [9, 8, 7] * 11, [42] * 7, [60, 61]]
SAMPLED = SamplingParams(max_tokens=12, temperature=0.9, top_k=40, top_p=0.95, seed=11, repetition_penalty=1.3)
TOKENIZER = ByteTokenizer(b"abcdefghijklmnopqrstuvwxyz .,!?" + "é€😀".encode())


@pytest.fixture(scope="module")
def shared_engine() -> Engine:
    """One engine for many tests: they also show that each leaves it as it was."""
    engine = Engine(TinyDecoder(), tokenizer=TOKENIZER)
    engine.warmup()
    return engine


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    shared_engine.prefill_chunk = None
    yield shared_engine
    assert_empty(shared_engine)


def assert_empty(engine: Engine) -> None:
    stats = engine.stats()
    assert stats.num_running == stats.num_waiting == 0
    assert stats.pages_used == (0, 0)
    assert not engine.has_requests


def tokens_of(engine: Engine, prompts: list[list[int]], params) -> list[list[int]]:
    return [output.token_ids for output in engine.generate(prompts, params)]


def run_to_end(engine: Engine) -> dict[int, list[RequestUpdate]]:
    updates: dict[int, list[RequestUpdate]] = {}
    while engine.has_requests:
        for update in engine.step():
            updates.setdefault(update.request_id, []).append(update)
    return updates


# The right tokens


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_greedy_is_the_uncached_models(engine: Engine, chunk: int | None):
    engine.prefill_chunk = chunk
    outputs = engine.generate(PROMPTS, SamplingParams(max_tokens=20))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.prompt_token_ids == prompt
        assert len(output.token_ids) == 20
        assert output.finish_reason == "length"
        assert_greedy(TinyDecoder().params, prompt, output.token_ids)


@pytest.mark.parametrize("params", [SamplingParams(max_tokens=12), SAMPLED], ids=["greedy", "sampled"])
def test_the_rest_of_the_batch_and_the_chunks_change_nothing(engine: Engine, params: SamplingParams):
    alone = [tokens_of(engine, [prompt], params)[0] for prompt in PROMPTS]
    assert tokens_of(engine, PROMPTS, params) == alone
    for chunk in (1, 3, 7):
        engine.prefill_chunk = chunk
        assert tokens_of(engine, PROMPTS, params) == alone
    order = [3, 0, 5, 1, 4, 2]
    assert tokens_of(engine, [PROMPTS[i] for i in order], params) == [alone[i] for i in order]


def test_requests_of_every_kind_in_one_batch(engine: Engine):
    kinds = [
        SamplingParams(max_tokens=9),
        SamplingParams(max_tokens=12, temperature=1.5, seed=1),
        SamplingParams(max_tokens=7, repetition_penalty=1.5, logprobs=3),
        SamplingParams(max_tokens=10, temperature=0.7, min_p=0.1, top_k=5, seed=2, repetition_penalty=0.8),
        SamplingParams(max_tokens=3, logprobs=0),
        SamplingParams(max_tokens=15, temperature=1.0, top_p=0.5, seed=3),
    ]
    alone = [tokens_of(engine, [prompt], params)[0] for prompt, params in zip(PROMPTS, kinds, strict=True)]
    assert tokens_of(engine, PROMPTS, kinds) == alone


@pytest.mark.parametrize(("page_size", "num_pages"), [(16, (16, 16)), (64, (4, 4))])
def test_page_sizes(shared_engine: Engine, page_size: int, num_pages: tuple[int, int]):
    engine = Engine(TinyDecoder(page_size=page_size, num_pages=num_pages, buckets=(16,)))
    for params in (SamplingParams(max_tokens=12), SAMPLED):
        assert tokens_of(engine, PROMPTS, params) == tokens_of(shared_engine, PROMPTS, params)
    assert_empty(engine)


def test_requests_that_come_while_others_run(engine: Engine):
    alone = [tokens_of(engine, [prompt], SAMPLED)[0] for prompt in PROMPTS]
    numbers = []
    updates: dict[int, list[int]] = {}
    for prompt in PROMPTS:
        numbers.append(engine.add_request(prompt, SAMPLED))
        for update in engine.step():
            updates.setdefault(update.request_id, []).extend(update.token_ids)
    for number, more in run_to_end(engine).items():
        updates.setdefault(number, []).extend(token for update in more for token in update.token_ids)
    assert [updates[number] for number in numbers] == alone


# Too few pages


@pytest.fixture(scope="module", params=[0.0, 10.0], ids=["one", "several"])
def small_engine(request: pytest.FixtureRequest) -> Engine:
    """Pages for one and a half long sequences, with a window group that only works because pages are given back."""
    return Engine(TinyDecoder(num_pages=(24, 9), buckets=(16,)), burst=request.param)


@pytest.mark.parametrize("params", [SamplingParams(max_tokens=30), SAMPLED], ids=["greedy", "sampled"])
def test_preemption_changes_no_token(shared_engine: Engine, small_engine: Engine, params: SamplingParams):
    num_before = small_engine.stats().num_preemptions
    outputs = small_engine.generate(PROMPTS, params)
    assert [output.token_ids for output in outputs] == tokens_of(shared_engine, PROMPTS, params)
    num_preemptions = small_engine.stats().num_preemptions - num_before
    assert sum(output.num_preemptions for output in outputs) == num_preemptions
    if params.max_tokens == 30:
        assert num_preemptions > 0
    assert_empty(small_engine)


def test_what_can_never_fit_is_refused_at_once():
    engine = Engine(TinyDecoder(num_pages=(8, 8), buckets=(8,)))
    message = (
        r"prompt 1 has 20 tokens, which with 14 new ones are more than the 32 that the KV cache holds: [^\n]*num_pages"
    )
    with pytest.raises(OutOfPagesError, match=message):
        engine.generate([[1], [2] * 20], SamplingParams(max_tokens=14))
    # The last token is only sampled, so one more than the pages hold can be had.
    [output] = engine.generate([[2] * 20], SamplingParams(max_tokens=13))
    assert len(output.token_ids) == 13
    [output] = engine.generate([[2] * 20], SamplingParams(max_tokens=None))
    assert len(output.token_ids) == 13
    assert_empty(engine)


def test_a_window_frees_pages(engine: Engine):
    number = engine.add_request([3] * 30, SamplingParams(max_tokens=30))
    most = [0, 0]
    while engine.has_requests:
        engine.step()
        most = [max(pair) for pair in zip(most, engine.stats().pages_used, strict=True)]
    assert number
    assert most[0] == 15  # 59 positions in pages of 4
    # A chunk of 16 and the 5 positions before it; then 6 positions in 2 or 3 pages.
    assert most[1] <= 7


# Ending


def test_stop_tokens(engine: Engine):
    [plain] = engine.generate([PROMPTS[1]], SamplingParams(max_tokens=12))
    stop = plain.token_ids[4]
    first = plain.token_ids.index(stop)
    [output] = engine.generate([PROMPTS[1]], SamplingParams(max_tokens=12, stop_token_ids=[stop, VOCAB + 5]))
    assert output.token_ids == plain.token_ids[: first + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.text == TOKENIZER.decode(plain.token_ids[:first])


def test_eos_ends_unless_ignored(shared_engine: Engine):
    [plain] = shared_engine.generate([PROMPTS[1]], SamplingParams(max_tokens=12))
    eos = plain.token_ids[4]
    engine = Engine(TinyDecoder(buckets=(4,)), eos_token_ids=[eos])
    [output] = engine.generate([PROMPTS[1]], SamplingParams(max_tokens=12))
    assert output.token_ids == plain.token_ids[: plain.token_ids.index(eos) + 1]
    assert output.finish_reason == "stop"
    [output] = engine.generate([PROMPTS[1]], SamplingParams(max_tokens=12, ignore_eos=True))
    assert output.token_ids == plain.token_ids
    assert output.text is None


def test_stop_strings(engine: Engine):
    params = SamplingParams(max_tokens=25, temperature=1.0, seed=4)
    [plain] = engine.generate([PROMPTS[2]], params)
    assert plain.text == TOKENIZER.decode(plain.token_ids)
    # A stop string that crosses tokens, and one that never comes.
    start = next(i for i in range(5, 20) if all(0 < len(TOKENIZER.decode([t])) < 2 for t in plain.token_ids[i : i + 2]))
    stop = TOKENIZER.decode(plain.token_ids[start : start + 2])
    stopping = SamplingParams(max_tokens=25, temperature=1.0, seed=4, stop=["@@", stop])
    [output] = engine.generate([PROMPTS[2]], stopping)
    cut = plain.text.index(stop)
    assert output.text == plain.text[:cut]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.token_ids == plain.token_ids[: len(output.token_ids)]
    seen = ""
    for update in engine.stream([PROMPTS[2]], stopping):
        seen += update.text or ""
        assert plain.text[:cut].startswith(seen)
    assert seen == plain.text[:cut]


def test_streams_give_what_generate_gives(engine: Engine):
    params = [SamplingParams(max_tokens=10 + i, temperature=1.2, seed=i, logprobs=2) for i in range(len(PROMPTS))]
    outputs = engine.generate(PROMPTS, params)
    updates: list[list[RequestUpdate]] = [[] for _ in PROMPTS]
    for update in engine.stream(PROMPTS, params):
        updates[update.prompt_idx].append(update)
    for output, mine in zip(outputs, updates, strict=True):
        assert [token for update in mine for token in update.token_ids] == output.token_ids
        assert "".join(update.text or "" for update in mine) == output.text
        assert [entry for update in mine for entry in update.logprobs or []] == output.logprobs
        assert [update.finish_reason for update in mine] == [None] * (len(mine) - 1) + ["length"]
        assert mine[-1].output is not None
        assert mine[-1].output.token_ids == output.token_ids


def test_streams_interleaved_with_each_other_and_with_steps(engine: Engine):
    expected = tokens_of(engine, PROMPTS[:3], SAMPLED)
    number = engine.add_request(PROMPTS[2], SAMPLED)
    streams = [engine.stream([prompt], SAMPLED) for prompt in PROMPTS[:2]]
    got: list[list[int]] = [[], []]
    while streams:
        for stream, tokens in zip(list(streams), got, strict=False):
            update = next(stream, None)
            if update is None:
                streams.remove(stream)
            else:
                tokens += update.token_ids
    manual = [token for update in run_to_end(engine)[number] for token in update.token_ids]
    assert sorted([*got, manual]) == sorted(expected)


# Seeds and log-probabilities


def test_seeds(engine: Engine):
    params = SamplingParams(max_tokens=12, temperature=1.5)
    first, second = engine.generate([PROMPTS[1]] * 2, params)
    assert first.seed != second.seed
    assert first.token_ids != second.token_ids
    again = SamplingParams(max_tokens=12, temperature=1.5, seed=second.seed)
    assert tokens_of(engine, [PROMPTS[0], PROMPTS[1]], again)[1] == second.token_ids
    big = SamplingParams(max_tokens=12, temperature=1.5, seed=2**63 + second.seed)
    assert tokens_of(engine, [PROMPTS[1]], big)[0] != second.token_ids


def test_logprobs_are_the_models(engine: Engine):
    params = SamplingParams(max_tokens=8, temperature=0.8, seed=1, repetition_penalty=1.4, top_k=20, logprobs=4)
    [output] = engine.generate([PROMPTS[1]], params)
    tokens = np.zeros(64, np.int32)
    tokens[: 3 + 8] = PROMPTS[1] + output.token_ids
    expected = jax.nn.log_softmax(reference_logits(TinyDecoder().params, tokens)[2 : 2 + 8])
    assert output.logprobs is not None
    for row, token, entry in zip(np.asarray(expected), output.token_ids, output.logprobs, strict=True):
        assert entry.token_id == token
        np.testing.assert_allclose(entry.logprob, row[token], atol=1e-4)
        np.testing.assert_allclose([value for _, value in entry.top], np.sort(row)[::-1][:4], atol=1e-4)
        np.testing.assert_allclose(row[[number for number, _ in entry.top]], np.sort(row)[::-1][:4], atol=1e-4)
    [none] = engine.generate([PROMPTS[1]], SamplingParams(max_tokens=2, logprobs=0))
    assert none.logprobs is not None
    assert [entry.top for entry in none.logprobs] == [(), ()]


def test_repetition_penalty_counts_the_prompt(engine: Engine):
    prompt = PROMPTS[2]
    params = SamplingParams(max_tokens=40, repetition_penalty=100.0)
    [output] = engine.generate([prompt], params)
    # So strong a penalty makes every other token likelier, while some have a positive logit.
    assert len(set(output.token_ids)) == len(output.token_ids)
    assert not set(output.token_ids[:20]) & set(prompt)


# Forks


def test_fork_goes_on_as_the_parent_would(engine: Engine):
    params = SamplingParams(max_tokens=15, temperature=0.8, seed=5, repetition_penalty=1.2, logprobs=1)
    [alone] = engine.generate([PROMPTS[2]], params)
    parent = engine.add_request(PROMPTS[2], params)
    for _ in range(6):
        engine.step()
    same = engine.fork(parent, params)
    other = engine.fork(parent)
    used = engine.stats().pages_used
    ends = {number: updates[-1].output for number, updates in run_to_end(engine).items()}
    assert ends[parent].token_ids == ends[same].token_ids == alone.token_ids
    assert ends[same].logprobs == alone.logprobs
    assert ends[other].token_ids[:4] == alone.token_ids[:4]
    assert ends[other].token_ids != alone.token_ids
    assert ends[other].seed != 5
    # The forks took no page: 20 tokens and some are the pages of one sequence.
    assert used[0] <= 7


def test_fork_of_a_greedy_request_may_have_a_penalty(engine: Engine):
    penalised = SamplingParams(max_tokens=15, repetition_penalty=100.0)
    parent = engine.add_request(PROMPTS[1], SamplingParams(max_tokens=15))
    for _ in range(5):
        engine.step()
    child = engine.fork(parent, penalised)
    ends = {number: updates[-1].output for number, updates in run_to_end(engine).items()}
    [plain] = engine.generate([PROMPTS[1]], SamplingParams(max_tokens=15))
    assert ends[parent].token_ids == plain.token_ids
    shared, own = ends[child].token_ids[:5], ends[child].token_ids[5:]
    assert shared == plain.token_ids[:5]
    assert len(set(own)) == len(own)
    assert not set(own) & {*PROMPTS[1], *shared}


def test_forks_refused(engine: Engine):
    number = engine.add_request(PROMPTS[1], SamplingParams(max_tokens=5))
    for _ in range(3):
        engine.step()
    with pytest.raises(RequestError, match="the 3 tokens it has generated already end the copy"):
        engine.fork(number, SamplingParams(max_tokens=3))
    with pytest.raises(RequestError, match="cannot be forked with log-probabilities"):
        engine.fork(number, SamplingParams(max_tokens=5, logprobs=1))
    run_to_end(engine)
    with pytest.raises(RequestError, match=f"request {number} cannot be forked: it has finished"):
        engine.fork(number)


def test_more_forks_than_slots_wait(engine: Engine):
    parent = engine.add_request(PROMPTS[1], SamplingParams(max_tokens=8))
    engine.step()
    forks = [engine.fork(parent, SamplingParams(max_tokens=8)) for _ in range(6)]
    assert engine.stats().num_waiting == 3
    ends = {number: updates[-1].output.token_ids for number, updates in run_to_end(engine).items()}
    assert all(ends[fork] == ends[parent] for fork in forks)


# Refused requests


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 1 is empty"),
        (
            [[1, VOCAB]],
            f"prompt 0 has token id {VOCAB} at index 1: the model's vocabulary has ids from 0 to {VOCAB - 1}",
        ),
        ([[-1]], "prompt 0 has token id -1 at index 0"),
        ([[2**70]], "prompt 0 is not a list of token ids"),
        ([[1.5]], "prompt 0 is not a list of token ids"),
        ([[True]], "prompt 0 is not a list of token ids"),
        ([[[1], [2, 3]]], "prompt 0 is not a list of token ids"),
        ([[[1, 2]]], "prompt 0 is not a list of token ids"),
        ([1, 2], "prompt 0 is not a list of token ids"),
        (["hello"], "prompt 0 is not a list of token ids"),
        ([[1] * 50], "prompt 0 has 50 tokens, which with 20 new ones are more than max_seq_len = 64"),
        ([[1] * 64], "prompt 0 has 64 tokens, which with 20 new ones"),
    ],
)
def test_bad_prompts(engine: Engine, prompts: list[object], message: str):
    for call in (engine.generate, engine.stream):
        with pytest.raises(RequestError, match=rf"^{message}[^\n]*$"):
            call(prompts, SamplingParams(max_tokens=20))


def test_bad_parameters(engine: Engine):
    with pytest.raises(RequestError, match="there are 2 prompts and 1 sampling parameters"):
        engine.generate([[1], [2]], [SamplingParams()])
    with pytest.raises(RequestError, match="stop strings need an engine with a tokenizer"):
        Engine(TinyDecoder()).generate([[1]], SamplingParams(stop="x"))
    with pytest.raises(RequestError, match="prefill_chunk = 0"):
        engine.prefill_chunk = 0
    assert engine.generate([]) == []
    assert tokens_of(engine, [np.array([1, 2])], SamplingParams(max_tokens=2))
    full = SamplingParams(max_tokens=None)
    assert len(engine.generate([[1] * 60], full)[0].token_ids) == 4
    with pytest.raises(RequestError, match="has 64 tokens, which with 1 new ones"):
        engine.generate([[1] * 64], full)


def test_max_waiting():
    engine = Engine(TinyDecoder(max_seqs=2, buckets=(4,)), max_waiting=1)
    params = SamplingParams(max_tokens=2)
    assert len(engine.generate([[1]] * 3, params)) == 3
    with pytest.raises(
        RequestError, match="4 requests are more than the 2 free of max_seqs = 2 slots and max_waiting = 1"
    ):
        engine.generate([[1]] * 4, params)
    assert_empty(engine)


# Cut short


def test_closing_a_stream_frees_its_pages_and_no_others(engine: Engine):
    other = engine.add_request(PROMPTS[1], SamplingParams(max_tokens=12))
    stream = engine.stream(PROMPTS, SamplingParams(max_tokens=30))
    for _ in range(9):
        next(stream)
    assert engine.stats().num_running == 4
    stream.close()
    assert engine.stats().num_running == 1
    assert engine.stats().num_waiting == 0
    [plain] = engine.generate([PROMPTS[1]], SamplingParams(max_tokens=12))
    assert run_to_end(engine)[other][-1].output.token_ids == plain.token_ids


def test_a_stream_that_is_never_read_adds_nothing(engine: Engine):
    stream = engine.stream(PROMPTS, SAMPLED)
    assert_empty(engine)
    del stream


def test_abort(engine: Engine):
    number = engine.add_request(PROMPTS[1], SamplingParams(max_tokens=12))
    waiting = [engine.add_request(PROMPTS[1], SamplingParams(max_tokens=12)) for _ in range(5)]
    engine.step()
    assert engine.abort(number)
    assert not engine.abort(number)
    assert not engine.abort(12345)
    assert engine.abort(waiting[-1])
    ends = {number: updates[-1].output for number, updates in run_to_end(engine).items()}
    assert ends[number].finish_reason == ends[waiting[-1]].finish_reason == "abort"
    assert len(ends[number].token_ids) == 1
    assert [len(ends[number].token_ids) for number in waiting[:-1]] == [12] * 4


class Interrupt:
    """Raises in the n-th call of a method of the engine's parts, before or after it does its work."""

    def __init__(self, target: object, name: str, *, after: int, late: bool, error: type[BaseException]) -> None:
        self.original = getattr(target, name)
        self.calls_left = after
        self.late = late
        self.error = error

    def __call__(self, *args, **kwargs):
        self.calls_left -= 1
        if self.calls_left == 0 and not self.late:
            raise self.error("injected")
        result = self.original(*args, **kwargs)
        if self.calls_left == 0:
            raise self.error("injected")
        return result


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("part", "name", "after"),
    [
        ("_scheduler", "schedule", 3),
        ("_scheduler", "remove", 1),
        ("_runner", "run", 4),
        ("_runner", "_run_step", 5),
        ("_runner", "_timed", 6),  # late: the donated cache is gone, and the new one was not kept
        ("_runner", "_run_sampler", 3),
        ("_runner", "_next_token", 5),
        ("_runner", "_ensure_seen", 2),
    ],
)
def test_interrupts_leave_the_engine_usable(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, part: str, name: str, after: int, late: bool, error: type
):
    expected = tokens_of(engine, PROMPTS, SAMPLED)
    other = engine.add_request(PROMPTS[0], SAMPLED)
    engine.step()
    with monkeypatch.context() as patch, pytest.raises(error, match="injected"):
        target = getattr(engine, part)
        patch.setattr(target, name, Interrupt(target, name, after=after, late=late, error=error))
        engine.generate(PROMPTS, SAMPLED)
    assert engine.stats().num_waiting + engine.stats().num_running <= 1
    assert tokens_of(engine, PROMPTS, SAMPLED) == expected
    ends = {number: updates[-1].output for number, updates in run_to_end(engine).items()}
    assert ends[other].token_ids == expected[0]


def test_a_tokenizer_that_raises_is_no_harm(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    def fail(ids: list[int]) -> str:
        raise UnicodeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(TOKENIZER, "decode", fail)
        with pytest.raises(UnicodeError, match="injected"):
            engine.generate(PROMPTS, SamplingParams(max_tokens=5, stop="x"))
    assert_empty(engine)
    assert tokens_of(engine, PROMPTS[:1], SamplingParams(max_tokens=3))


def test_logits_that_are_not_numbers_end_the_request_and_no_other():
    model = TinyDecoder(buckets=(4,))
    model.params["embed"] = model.params["embed"].at[7].set(np.nan)
    engine = Engine(model)
    params = SamplingParams(max_tokens=10)
    with pytest.raises(RequestError, match=r"^the model's logits for request \d+ are not numbers[^\n]*$"):
        engine.generate([[1, 7]], params)
    assert_empty(engine)
    good = engine.add_request([1, 2, 3], params)
    engine.step()
    bad = engine.add_request([1, 7], params)
    ends = {number: updates[-1].output for number, updates in run_to_end(engine).items()}
    assert (ends[bad].finish_reason, ends[bad].token_ids) == ("error", [])
    assert_greedy(model.params, [1, 2, 3], ends[good].token_ids)
    with pytest.raises(LlmirError, match="not numbers"):
        list(engine.stream([[1, 2], [7]], SAMPLED))
    assert_empty(engine)


# Programs


def test_warmup_compiles_everything(caplog: pytest.LogCaptureFixture):
    model = TinyDecoder(buckets=(2, 8))
    engine = Engine(model, tokenizer=TOKENIZER)
    compiled = engine.warmup()
    assert [(c.program, c.bucket) for c in compiled] == [
        ("step", 2),
        ("step", 8),
        ("sample", None),
        ("copy pages", None),
        ("fill seen tokens", None),
    ]
    assert all(c.seconds > 0 for c in compiled)
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        engine.generate(PROMPTS, SamplingParams(max_tokens=6))
        engine.generate(PROMPTS, SAMPLED)
        parent = engine.add_request(PROMPTS[1], SAMPLED)
        engine.step()
        engine.fork(parent)
        run_to_end(engine)
        assert engine.warmup() == ()
    assert [record.message for record in caplog.records if "Compiling" in record.message] == []
    assert engine.compilations == compiled


def test_an_engine_is_freed_with_its_cache():
    model = TinyDecoder(buckets=(4,), params=dict(TinyDecoder().params))
    engine = Engine(model)
    engine.generate([[1, 2]], SamplingParams(max_tokens=2))
    gone = weakref.ref(model), weakref.ref(engine)
    del model, engine
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
