"""What is read off a compiled program: sizes, loops and their rounds, collectives, copies, library calls; by hand."""

import pytest

from vlmalign.planning.hlo import Traffic, read_program, size_of

#: a loop of 16 rounds around a loop that depends on data; a fusion that only copies, one that computes
PROGRAM = """HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%fused_moves (p0: bf16[1024,512], p1: bf16[1024,512]) -> bf16[2048,512] {
  %p0 = bf16[1024,512]{1,0} parameter(0)
  %p1 = bf16[1024,512]{1,0} parameter(1)
  ROOT %c = bf16[2048,512]{1,0} concatenate(%p0, %p1), dimensions={0}
}

%fused_works (p0: f32[1024,1024]) -> f32[1024,1024] {
  %p0 = f32[1024,1024]{1,0} parameter(0)
  %t = f32[1024,1024]{0,1} transpose(%p0), dimensions={1,0}
  ROOT %m = f32[1024,1024]{1,0} multiply(%p0, %t)
}

%inner_body (s: (s32[], f32[2048,256])) -> (s32[], f32[2048,256]) {
  %s = (s32[], f32[2048,256]{1,0}) parameter(0)
  %v = f32[2048,256]{1,0} get-tuple-element(%s), index=1
  %again = f32[2048,256]{1,0} copy(%v)
  %little = f32[8]{0} copy(%w)
  ROOT %out = (s32[], f32[2048,256]{1,0}) tuple(%i, %again)
}

%inner_condition (s: (s32[], f32[2048,256])) -> pred[] {
  ROOT %more = pred[] constant(true)
}

%outer_body (s: (s32[], f32[2048,256])) -> (s32[], f32[2048,256]) {
  %s = (s32[], f32[2048,256]{1,0}) parameter(0)
  %joined = bf16[2048,512]{1,0} fusion(%a, %b), kind=kLoop, calls=%fused_moves
  %worked = f32[1024,1024]{1,0} fusion(%d), kind=kLoop, calls=%fused_works
  %gathered = f32[64,16]{1,0} all-gather(%e), dimensions={0}
  %product = (f32[8,8]{1,0}, s8[1024]{0}) custom-call(%d, %d), custom_call_target="__cublas$gemm"
  ROOT %while.1 = (s32[], f32[2048,256]{1,0}) while(%s), condition=%inner_condition, body=%inner_body
}

%outer_condition (s: (s32[], f32[2048,256])) -> pred[] {
  ROOT %more = pred[] constant(true)
}

ENTRY %main (p: f32[2048,256]) -> f32[2048,256] {
  %p = f32[2048,256]{1,0} parameter(0)
  %once = f32[2048,256]{1,0} copy(%p)
  %reduced = ((f32[100]{0}, /*index=1*/f32[4]{0}), (f32[100]{0}, f32[4]{0})) all-reduce-start(%f, %g), to_apply=%add
  %done = (f32[100]{0}, f32[4]{0}) all-reduce-done(%reduced)
  %sorted = f32[64]{0} sort(%h), dimensions={0}, to_apply=%add
  ROOT %while.2 = (s32[], f32[2048,256]{1,0}) while(%t), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"16"}}
}
"""


@pytest.fixture(scope="module")
def found():
    return read_program(PROGRAM)


def test_sizes():
    assert size_of("bf16[2048,512]{1,0}") == 2 * 2048 * 512
    assert size_of("(s32[], /*index=1*/pred[3]{0}, f8e4m3fn[4]{0})") == 4 + 3 + 4
    with pytest.raises(ValueError, match="q9"):
        size_of("q9[4]")


def test_collectives_know_their_loop(found):
    assert found.collectives == (
        Traffic("all-gather", "x16", 1, 16 * 64 * 16 * 4),
        # What starts it holds operands and results; what ends it, results alone.
        Traffic("all-reduce", "", 1, 104 * 4),
    )


def test_large_copies_in_loops(found):
    """Not the one outside of loops, not the little one, not the fusion that computes; rounds that depend on data: once."""
    assert found.copies == (
        Traffic("concatenate", "x16", 1, 16 * 2 * 2048 * 512),
        Traffic("copy", "x16x?", 1, 16 * 4 * 2048 * 256),
    )


def test_calls_and_sorts(found):
    assert found.calls == {"__cublas$gemm": 1}
    assert found.sorts == 1
