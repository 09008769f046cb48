/* Vectors of 16 floats, in GNU C: a compiler splits them where registers are narrower. */
#ifndef TRITONBNN_VECTOR_H
#define TRITONBNN_VECTOR_H

#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define LANES 16

typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef int16_t short_vec __attribute__((vector_size(32)));
typedef uint16_t ushort_vec __attribute__((vector_size(32)));
typedef uint16_t bfloat16; /* the upper half of a float */

/* A vector in parts that each fit a register. A compiler without wider ones keeps whole vectors in
   memory and copies them piece by piece, so the loops that take most of the time go by parts. */
#if defined(__AVX512F__)
enum { PARTS = 1 };
#elif defined(__AVX__)
enum { PARTS = 2 };
#else
enum { PARTS = 4 };
#endif
typedef float part __attribute__((vector_size(sizeof(vec) / PARTS), may_alias));
typedef int32_t part_bits __attribute__((vector_size(sizeof(vec) / PARTS), may_alias));

/* A loop over what should be in registers. */
#define EACH(i, count) _Pragma("GCC unroll 8") for (int i = 0; i < (count); i++)

INLINE vec splat(float x) { return x - (vec){0}; }

INLINE vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }

INLINE part load_part(const float *p) {
    part v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* to += from. */
INLINE void add_vec(vec *to, const vec *from) {
    EACH(r, PARTS) ((part *)to)[r] += ((const part *)from)[r];
}

#if defined(__AVX2__) && !defined(__AVX512F__)
/* All bits of a lane below the count, for half of the lanes. */
INLINE __m256i half_mask(int64_t count) {
    static const int32_t ones[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    int64_t start = 8 - (count < 0 ? 0 : count > 8 ? 8 : count);
    return _mm256_loadu_si256((const __m256i *)(ones + start));
}
#endif

/* At most 16 floats. Lanes past the count are 0, and no memory past it is read. */
INLINE vec load_floats(const float *p, int64_t count) {
    if (count >= LANES) return load(p);
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#elif defined(__AVX2__)
    __m256 halves[2] = {_mm256_maskload_ps(p, half_mask(count)),
                        _mm256_maskload_ps(p + 8, half_mask(count - 8))};
    vec v;
    memcpy(&v, halves, sizeof v);
    return v;
#else
    float floats[LANES] = {0};
    for (int64_t i = 0; i < count; i++) floats[i] = p[i];
    return load(floats);
#endif
}

/* Write the lanes below the count. */
INLINE void store_floats(float *p, vec v, int64_t count) {
    if (count >= LANES) {
        store(p, v);
        return;
    }
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
#elif defined(__AVX2__)
    __m256 halves[2];
    memcpy(halves, &v, sizeof v);
    _mm256_maskstore_ps(p, half_mask(count), halves[0]);
    _mm256_maskstore_ps(p + 8, half_mask(count - 8), halves[1]);
#else
    memcpy(p, &v, count * sizeof(float));
#endif
}

/* yes where mask is all ones, no where it is 0: a comparison of two vecs gives such a mask. */
INLINE vec choose(ivec mask, vec yes, vec no) {
    return (vec)((mask & (ivec)yes) | (~mask & (ivec)no));
}

/* Bit i is 1 iff lane i is >= 0; it is 0 for a NaN. */
INLINE uint32_t not_negative(vec v) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_GE_OQ);
#elif defined(__AVX2__)
    __m256 halves[2];
    memcpy(halves, &v, sizeof v);
    uint32_t low = _mm256_movemask_ps(_mm256_cmp_ps(halves[0], _mm256_setzero_ps(), _CMP_GE_OQ));
    uint32_t high = _mm256_movemask_ps(_mm256_cmp_ps(halves[1], _mm256_setzero_ps(), _CMP_GE_OQ));
    return low | high << 8;
#elif defined(__SSE2__)
    __m128 quarters[4];
    memcpy(quarters, &v, sizeof v);
    uint32_t bits = 0;
    for (int i = 0; i < 4; i++)
        bits |= (uint32_t)_mm_movemask_ps(_mm_cmpge_ps(quarters[i], _mm_setzero_ps())) << 4 * i;
    return bits;
#else
    uint32_t bits = 0;
    for (int i = 0; i < LANES; i++)
        bits |= (uint32_t)(v[i] >= 0) << i;
    return bits;
#endif
}

INLINE void store_shorts(int16_t *p, short_vec v, int64_t count) {
    if (count >= LANES) {
        memcpy(p, &v, sizeof v);
        return;
    }
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << count) - 1), (__m256i)v);
#else
    memcpy(p, &v, count * sizeof *p);
#endif
}

INLINE vec load_bfloat16(const bfloat16 *p) {
    ushort_vec half;
    memcpy(&half, p, sizeof half);
    return (vec)(__builtin_convertvector(half, uvec) << 16);
}

/* Rounded to nearest, ties to even; a NaN stays one. */
INLINE void store_bfloat16(bfloat16 *p, vec v) {
    uvec bits = (uvec)v;
    uvec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    uvec quiet = bits >> 16 | 0x40;
    uvec is_nan = (uvec)(v != v);
    ushort_vec half = __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), ushort_vec);
    memcpy(p, &half, sizeof half);
}

INLINE vec load_int16(const int16_t *p) {
    short_vec v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, vec);
}

INLINE vec load_int32(const int32_t *p) {
    ivec v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, vec);
}

#endif
