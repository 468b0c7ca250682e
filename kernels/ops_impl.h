/* Everything between the matrix products, written once and compiled once per instruction set.
 *
 * The including file gives LANES (4, 8 or 16), SUMS (how many vectors of sums stay in registers
 * beside what is added: 8 or 16), the vector type vf of LANES floats, and vf_load, vf_store,
 * vf_set, vf_fma (a * b + c), vf_max, lanes_max, vf_any_above (whether any lane of a is above that
 * of b), vf_load_f16, vf_store_f16; then KERNELS, the name of the table, and ISA, LINEAR.
 *
 * What is computed for one token is the same, operation by operation, whatever else is in the step.
 * Sums run in LANES fixed lanes that are added at the end in a fixed order. Plain loops are left to
 * the compiler's vectorizer: without contraction an elementwise loop rounds the same in its vectors
 * and in its tail.
 */
#include <math.h>
#include <string.h>

#include "kernels.h"

#define INLINE static inline __attribute__((always_inline))

typedef int32_t vi __attribute__((vector_size(LANES * 4)));

#include "math_impl.h"

#include "kv_impl.h"
#include "attend_impl.h"
#include "rows_impl.h"
#include "mixers_impl.h"
#include "sample_impl.h"

const kernel_table KERNELS = {
    .isa = ISA,
    .linear = &LINEAR,
    .rmsnorm = rmsnorm,
    .layernorm = layernorm,
    .rope = rope_rows,
    .store_kv = store_kv,
    .attend = attend,
    .activate = activate,
    .gate = gate_row,
    .softcap = softcap,
    .mul = mul,
    .add = add,
    .scale = scale_row,
    .mamba2 = mamba2,
    .delta_net = delta_net,
    .group_maxima = group_maxima,
    .exp_sum = exp_sum,
};
