"""Text as it streams: whole characters, exact stop strings, and the same text as decoding at once."""

from hypothesis import given
from hypothesis import strategies as st

from llmir_jax.runtime.text import TextStream

# Bytes of one-, two-, three- and four-byte characters, of a stop string, and some that are part of nothing.
PIECES = [
    b"a",
    b"b",
    b"ST",
    b"OP",
    b"STO",
    b"P!",
    b"S",
    b"\xc3",
    b"\xa9",
    b"\xe2\x82",
    b"\xac",
    b"\xf0\x9f",
    b"\x98\x80",
    b"\xff",
]


def decode(ids: list[int]) -> str:
    return b"".join(PIECES[i] for i in ids).decode("utf-8", errors="replace")


def stream(ids: list[int], stop: tuple[str, ...] = (), prompt: list[int] | None = None):
    """Text after each token, the final text, and the stream."""
    tokens = list(prompt or [])
    start = len(tokens)
    text = TextStream(decode, tokens, start=start, stop=stop)
    shown = []
    for token in ids:
        tokens.append(token)
        text.advance(len(tokens))
        shown.append(text.text)
        if text.stop_string is not None:
            break
    text.finish(len(tokens))
    return shown, text.text, text


def ids_of(*pieces: bytes) -> list[int]:
    return [PIECES.index(piece) for piece in pieces]


def test_a_split_character_waits_for_its_last_byte():
    shown, final, _ = stream(ids_of(b"a", b"\xf0\x9f", b"\x98\x80", b"b"))
    assert shown == ["a", "a", "a😀", "a😀b"]
    assert final == "a😀b"


def test_what_never_becomes_a_character_is_shown_at_the_end():
    shown, final, _ = stream(ids_of(b"a", b"\xe2\x82"))
    assert shown == ["a", "a"]
    assert final == "a�"


def test_stop_string_over_tokens_is_held_back_and_cut():
    shown, final, text = stream(ids_of(b"a", b"ST", b"OP", b"b"), stop=("STOP",))
    assert shown == ["a", "a", "a"]
    assert (final, text.stop_string) == ("a", "STOP")


def test_what_only_began_like_a_stop_string_is_shown():
    shown, final, text = stream(ids_of(b"S", b"ST", b"a", b"STO"), stop=("STOP",))
    assert shown == ["", "S", "SSTa", "SSTa"]
    assert (final, text.stop_string) == ("SSTaSTO", None)


def test_stop_string_inside_a_token_and_before_an_incomplete_character():
    _, final, text = stream(ids_of(b"a", b"STO", b"P!", b"b"), stop=("OP", "P!"))
    assert (final, text.stop_string) == ("aST", "OP")
    tokens = ids_of(b"STO", b"P!")
    stream_ = TextStream(lambda ids: decode(ids) + "�" * (len(ids) == 2), tokens, start=0, stop=("STOP",))
    stream_.advance(2)
    assert (stream_.text, stream_.stop_string) == ("", "STOP")


def test_the_prompt_is_no_part_of_it():
    _, final, text = stream(ids_of(b"OP", b"a"), stop=("STOP",), prompt=ids_of(b"b", b"ST"))
    assert (final, text.stop_string) == ("OPa", None)


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=30))
def test_all_text_is_that_of_decoding_at_once(ids: list[int]):
    shown, final, _ = stream(ids)
    assert final == decode(ids)
    for before, after in zip(shown, [*shown[1:], final], strict=False):
        assert after.startswith(before)
    at_once = TextStream(decode, list(ids), start=0)
    at_once.finish(len(ids))
    assert at_once.text == final


@given(
    st.lists(st.integers(0, len(PIECES) - 1), max_size=30),
    st.lists(st.sampled_from(["STOP", "OP", "aa", "é", "b€", "P!S", "S"]), min_size=1, max_size=3, unique=True),
)
def test_stop_strings_cut_where_a_whole_search_finds_them(ids: list[int], stop: list[str]):
    shown, final, text = stream(ids, tuple(stop))
    for before, after in zip(shown, [*shown[1:], final], strict=False):
        assert after.startswith(before)
    at_once = TextStream(decode, list(ids), start=0, stop=stop)
    at_once.finish(len(ids))
    assert (at_once.text, at_once.stop_string) == (final, text.stop_string)
    whole = decode(ids)
    if text.stop_string is None:
        assert final == whole
        # Only a character that the end made of incomplete bytes could have completed one.
        assert all(whole.find(s) < 0 for s in stop)
        return
    assert whole.startswith(final + text.stop_string)
    assert all(final.find(s) < 0 for s in stop)
