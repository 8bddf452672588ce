"""Bundles are counted as a core issues them: a loop's as often as it runs, a grid's body without its extra trips."""

import pytest
import tpu_bundles

KERNEL = """
= control target key start
LB: loop body
= control target key end

     0   :  { %9 = vsyncpa [#allocation4], 0 } /* Start region 1 */
   0x1 LB: > { %s18_s18 = sphi %s3_s18, %s4_s18  ;;  %p2_p10 = scmp.ge.s32.totalorder %s18_s18, 8 }
   0x2   : > { %170 = sbr.rel (%p2_p10) target = $region36 }
   0x3   :  {}
   0x4   :  {}
   0x5   :  {}
   0x6   :  {}
   0x7   : > { %p90_p1 = scmp.ge.s32.totalorder %s3_s21, 10 /* loop exit test */ }
   0x8 LB: >> { %v1_v4 = vmov 0 /* materialized constant:
 second line */  ;;  %p294_p5 = scmp.ge.s32.totalorder %s297_s20, 3 /* loop exit test */ }
   0x9   : >> { %2271 = vmatmul.mubr.s8.vlgmr.msra.gmra.mxu1 %v1_v4 }
   0xa   : >> { %296 = sbr.rel (!%p294_p5) target = $region138 }
   0xb   :  {}
   0xc   : > { %4583 = sbr.rel (!%p11_p2) target = $region39 } /* a scalar of the outer loop, and its branch */
   0xd   :  {}
   0xe   :  {}
   0xf PF: > { %s1_s1 = sand.u32 1, %s2_s2 } /* Start/End empty region 36 */
  0x10   : > { %23 = sbr.rel (!%p90_p1) target = $region149 }
  0x11   :  {}
  0x12   :  {}
  0x13   :  {}
  0x14   :  {}
  0x15   :  { %2623 = vsyncpa [#allocation4], 1 }
"""


def test_a_loop_counts_as_often_as_it_runs():
    # Around the grid 2; on each of its 10 trips 6 + 6; in the 8 of them that multiply 1 + 3 · 7.
    assert tpu_bundles.cycles(KERNEL) == 2 + 10 * (6 + 6) + 8 * (1 + 3 * 7)


def test_what_does_not_multiply_is_no_grid():
    assert tpu_bundles.cycles(KERNEL.replace("vmatmul", "vadd")) == 2 + 10 * (6 + 6 + 1 + 3 * 7)


def test_loops_of_unknown_trips_are_refused():
    with pytest.raises(ValueError, match="not a constant"):
        tpu_bundles.cycles(KERNEL.replace("%s297_s20, 3", "%s297_s20, %s9_s9"))
