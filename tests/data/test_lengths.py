"""Limits on lengths: nothing within them changes, nothing beyond them stays, and no image is ever cut."""

import numpy as np
import pytest
from tiny_tokenizer import SOFT_TOKENS, chat_folder

from vlmalign.data.chat.chat import Chat, open_chat
from vlmalign.data.groups import collate, layout_of
from vlmalign.data.lengths import fit
from vlmalign.types import Grid, Group, Segment


def segment(text: str) -> Segment:
    """One letter a token: a capital is a label, a small letter is none, a digit is a soft token of that image."""
    image = np.array([int(c) if c.isdigit() else -1 for c in text], np.int32)
    weight = np.array([float(c.isupper()) for c in text], np.float32)
    return Segment(np.arange(len(text), dtype=np.int32), image, weight)


def group(prompt: str, *continuations: str, id: int = 7) -> Group:
    pieces = [segment(text) for text in (prompt, *continuations)]
    images = max(int(p.image.max(initial=-1)) for p in pieces) + 1
    return Group(id, pieces[0], tuple(pieces[1:]), tuple(f"film {i}" for i in range(images)))


def drawn(group: Group) -> list[str]:
    return ["".join(str(i) if i >= 0 else "aA"[int(w)] for i, w in zip(p.image, p.weight, strict=True))
            for p in (group.prompt, *group.continuations)]  # fmt: skip


#: continuation, limit -> what truncation leaves of it ("" : nothing to learn from, skipped)
TABLE = [
    ("AAAA", 4, "AAAA"),
    ("AAAA", 3, "AAA"),
    ("AAaA", 3, "AA"),
    ("AAaaAA", 5, "AAaaA"),
    ("AAa000aA", 7, "AA"),
    ("AAa000aA", 8, "AAa000aA"),
    ("AAa000aA", 5, "AA"),
    ("AA000AA", 6, "AA000A"),
    ("AA000AA", 5, "AA"),
    ("AA000AA", 4, "AA"),
    ("AA000AA", 3, "AA"),
    ("AA000AA", 2, "AA"),
    ("AA000111A", 8, "AA"),
    ("A000aA111aA", 8, "A000aA"),
    ("a000A", 4, ""),
    ("aaA", 2, ""),
]


@pytest.mark.parametrize(("text", "limit", "left"), TABLE)
def test_truncation_by_hand(text, limit, left):
    fitted = fit([group("aaaaaa", text)], prompt=6, completion=limit, on_long="truncate")
    if not left:
        assert fitted.groups == fitted.truncated == []
        assert fitted.skipped == [
            f"group 7: a continuation has {len(text)} tokens, more than {limit}, with no label among them"
        ]
        return
    assert [drawn(g) for g in fitted.groups] == [["aaaaaa", left]]
    assert fitted.skipped == []
    changed = [f"group 7: a continuation has {len(text)} tokens, more than {limit}"] if left != text else []
    assert fitted.truncated == changed


def test_truncation_never_cuts_an_image_at_any_limit():
    """Whatever the conversation and the limit: what is left is a beginning, is short enough, and has whole images."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        runs = ["A" * int(rng.integers(1, 4)) if kind == 0 else "a" * int(rng.integers(1, 3)) if kind == 1 else "x"
                for kind in rng.integers(0, 3, 8)]  # fmt: skip
        number = iter(range(9))
        text = "".join(str(next(number)) * 3 if run == "x" else run for run in runs) + "A"
        whole = group("a", text)
        for limit in range(1, len(text) + 2):
            fitted = fit([whole], prompt=None, completion=limit, on_long="truncate")
            assert len(fitted.groups) + len(fitted.skipped) == 1
            for g in fitted.groups:
                (left,) = g.continuations
                assert len(left) <= limit
                assert left.tokens.tolist() == list(range(len(left)))
                assert left.weight[-1] == 1
                _, counts = np.unique(left.image[left.image >= 0], return_counts=True)
                assert set(counts) <= {3}
                assert len(g.images) == len(counts)


def test_prompts_are_never_cut():
    groups = [group("aaaa", "A", id=1), group("aaaaa", "A", id=2), group("aaaaa", "AAA", id=3)]
    said = ["group 2: the prompt has 5 tokens, more than 4", "group 3: the prompt has 5 tokens, more than 4"]
    for on_long in ("skip", "truncate"):
        fitted = fit(groups, prompt=4, completion=2, on_long=on_long)
        assert fitted.groups == groups[:1]
        assert fitted.skipped == said
        assert fitted.truncated == []
    with pytest.raises(ValueError, match="group 2: the prompt has 5 tokens, more than 4; raise the limit"):
        fit(groups, prompt=4, completion=2, on_long="error")


def test_error_and_skip():
    groups = [group("a", "AA", id=1), group("a", "AAA", id=2), group("a", id=3)]
    fitted = fit(groups, prompt=None, completion=2, on_long="skip")
    assert [g.id for g in fitted.groups] == [1, 3]
    assert fitted.skipped == ["group 2: a continuation has 3 tokens, more than 2"]
    with pytest.raises(ValueError, match="group 2: a continuation has 3 tokens, more than 2; raise the limit"):
        fit(groups, prompt=None, completion=2, on_long="error")


def test_groups_within_the_limits_are_the_same_objects():
    groups = [group("a00a", "AA", "a111A")]
    for on_long in ("error", "skip", "truncate"):
        for limits in ((None, None), (4, 5)):
            fitted = fit(groups, prompt=limits[0], completion=limits[1], on_long=on_long)
            assert fitted.groups[0] is groups[0]
            assert fitted.skipped == fitted.truncated == []


def test_pairs_stay_pairs():
    """Of several continuations only the long ones are cut; an image that none shows any more is dropped."""
    fitted = fit([group("a00a", "AAa111A", "AAa222A")], prompt=None, completion=6, on_long="truncate")
    assert [drawn(g) for g in fitted.groups] == [["a00a", "AA", "AA"]]
    assert fitted.groups[0].images == ("film 0",)
    fitted = fit([group("a", "AAa000aaaA", "AAa111A")], prompt=None, completion=7, on_long="truncate")
    assert [drawn(g) for g in fitted.groups] == [["a", "AA", "AAa000A"]]
    assert fitted.groups[0].images == ("film 1",)
    # A pair of which one side would have nothing to compare is no pair.
    fitted = fit([group("a", "AAA", "aaaA")], prompt=None, completion=3, on_long="truncate")
    assert fitted.groups == []
    assert len(fitted.skipped) == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"on_long": "cut"}, "on_long must be one of error, skip, truncate, found 'cut'"),
        ({"prompt": 0}, "limit on prompt tokens must be >= 1, found 0"),
        ({"completion": -3}, "limit on completion tokens must be >= 1, found -3"),
    ],
)
def test_wrong_settings(wrong, said):
    with pytest.raises(ValueError, match=said):
        fit([], **{"prompt": None, "completion": None, "on_long": "skip", **wrong})


def test_what_is_left_of_a_conversation_still_makes_a_batch():
    """At every limit, through the real chat and collation, which refuses an image that is not whole."""
    chat: Chat = open_chat(chat_folder(), family="gemma3", image_tokens=lambda key: SOFT_TOKENS)
    film = {"role": "user", "content": [{"type": "image", "image": "film"}, {"type": "text", "text": "Large?"}]}
    other = {"role": "user", "content": [{"type": "image", "image": "other"}, {"type": "text", "text": "Seen?"}]}
    answer = {"role": "assistant", "content": "Yes, the heart is large."}
    whole = chat.example([film, answer, other, answer, film, answer])
    (full,) = whole.continuations
    lengths = set()
    for limit in range(1, len(full)):
        (left,) = fit([whole], prompt=None, completion=limit, on_long="truncate").groups
        batch, keys = collate(
            [left], layout_of([left], prompt_multiple=1, completion_multiple=1), rows=1, grid=lambda key: Grid(2, 2)
        )
        assert set(keys) == set(left.images)
        assert batch.weight.sum() == left.continuations[0].weight.sum() > 0
        lengths.add((len(left.images), len(left.continuations[0])))
    assert {images for images, _ in lengths} == {1, 2}
    assert max(length for _, length in lengths) == len(full) - 1
