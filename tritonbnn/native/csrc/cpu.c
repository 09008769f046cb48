/* What a library says of itself, and which instruction sets this machine runs.

   The first two are data: they can be read before any code of a library may run. Compiled for the
   baseline and alone, this file is the probe that chooses among the libraries. */
#include "vector.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

EXPORT const int64_t tritonbnn_abi = TRITONBNN_ABI;
EXPORT const char tritonbnn_isa[] = TRITONBNN_ISA;

#if defined(__x86_64__)
/* Not a name that every compiler's __builtin_cpu_supports knows. */
static int converts_halves(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

/* __builtin_cpu_supports also asks whether the operating system saves the wide registers. */
static int runs_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
           __builtin_cpu_supports("popcnt") && converts_halves();
}

static int runs_avx512(void) {
    return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vpopcntdq");
}
#endif

/* 0: the baseline alone; 1: avx2 too; 2: avx512 too. */
EXPORT int64_t tritonbnn_best_isa(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return runs_avx512() ? 2 : runs_avx2() ? 1 : 0;
#else
    return 0;
#endif
}
