/* Sixteen numbers side by side, in C that gcc and clang split into whatever registers there are. */
#ifndef TRITONBNN_LANES_H
#define TRITONBNN_LANES_H

#include <stdint.h>
#if __STDC_HOSTED__
#include <string.h>
#else /* by these names the compiler would not know them for its own */
#define memcpy __builtin_memcpy
#define memset __builtin_memset
#endif

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#elif defined(__wasm_simd128__)
#include <wasm_simd128.h>
#endif

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, HEAD_LANES = 64 };

typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));

INLINE vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }

INLINE vec splat(float x) { return x - (vec){0}; }

/* As many as a register holds. What gcc makes of a vec that has no register of its own is slow. */
#if defined(__AVX512F__)
enum { FEW = 16 };
#elif defined(__AVX2__)
enum { FEW = 8 };
#else
enum { FEW = 4 };
#endif
typedef float few __attribute__((vector_size(4 * FEW)));
typedef int32_t ifew __attribute__((vector_size(4 * FEW)));

#if !defined(__AVX512F__)
/* Each of `yes` where a is above b, else of `no`. */
INLINE vec choose_above(vec a, vec b, vec yes, vec no) {
    few left[LANES / FEW], right[LANES / FEW], first[LANES / FEW], second[LANES / FEW];
    memcpy(left, &a, sizeof a);
    memcpy(right, &b, sizeof b);
    memcpy(first, &yes, sizeof yes);
    memcpy(second, &no, sizeof no);
    for (int i = 0; i < LANES / FEW; i++) {
        ifew above = left[i] > right[i];
        first[i] = (few)((above & (ifew)first[i]) | (~above & (ifew)second[i]));
    }
    memcpy(&yes, first, sizeof yes);
    return yes;
}
#endif

/* t where it is above 0, else t * slope. */
INLINE vec prelu(vec t, vec slope) {
#if defined(__AVX512F__)
    __mmask16 low = _mm512_cmp_ps_mask((__m512)t, _mm512_setzero_ps(), _CMP_LE_OQ);
    return (vec)_mm512_mask_mul_ps((__m512)t, low, (__m512)t, (__m512)slope);
#else
    return choose_above(t, splat(0), t, t * slope);
#endif
}

INLINE vec maximum(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose_above(a, b, a, b);
#endif
}

/* Bit i is 1 if lane i of v is at least that of w. */
INLINE uint16_t at_least(vec v, vec w) {
#if defined(__AVX512F__)
    return (uint16_t)_mm512_cmp_ps_mask((__m512)v, (__m512)w, _CMP_GE_OQ);
#elif defined(__AVX2__)
    __m256 a[2], b[2];
    memcpy(a, &v, sizeof v);
    memcpy(b, &w, sizeof w);
    int low = _mm256_movemask_ps(_mm256_cmp_ps(a[0], b[0], _CMP_GE_OQ));
    int high = _mm256_movemask_ps(_mm256_cmp_ps(a[1], b[1], _CMP_GE_OQ));
    return (uint16_t)(low | high << 8);
#elif defined(__SSE2__)
    __m128 a[4], b[4];
    int bits = 0;
    memcpy(a, &v, sizeof v);
    memcpy(b, &w, sizeof w);
    for (int i = 0; i < 4; i++) bits |= _mm_movemask_ps(_mm_cmpge_ps(a[i], b[i])) << 4 * i;
    return (uint16_t)bits;
#elif defined(__wasm_simd128__)
    v128_t a[4], b[4];
    uint32_t bits = 0;
    memcpy(a, &v, sizeof v);
    memcpy(b, &w, sizeof w);
    for (int i = 0; i < 4; i++) bits |= wasm_i32x4_bitmask(wasm_f32x4_ge(a[i], b[i])) << 4 * i;
    return (uint16_t)bits;
#else
    const ivec place = {1,   2,   4,    8,    16,   32,   64,    128,
                        256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    ivec bits = (ivec)(v >= w) & place;
    int32_t sum = 0;
    for (int i = 0; i < LANES; i++) sum |= bits[i];
    return (uint16_t)sum;
#endif
}

#endif
