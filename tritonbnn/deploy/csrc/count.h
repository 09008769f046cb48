/* The product of signs with signs: how many bits differ between inputs and the weight's channels.

   A word of the input meets the same word of LANES output channels at once, for PIXELS outputs
   whose counts stay in registers. */
#ifndef TRITONBNN_COUNT_H
#define TRITONBNN_COUNT_H

#include "lanes.h"

#if defined(__AVX512VPOPCNTDQ__)

enum { PIXELS = 8, FEW_WORDS = 4 };

#define XOR3 0x96      /* a ^ b ^ c */
#define CARRY 0x3a     /* a ? ~b : c */
#define WORD(x) _mm512_set1_epi32((int)(x))
#define TERNARY _mm512_ternarylogic_epi32

/* Few words: each is counted alone, as nothing is left over then. */
INLINE void count_few(const uint32_t *weight, const uint32_t *const inputs[PIXELS], int64_t words,
                      int pixels, ivec counts[PIXELS]) {
    __m512i sums[PIXELS];
    for (int p = 0; p < pixels; p++) sums[p] = _mm512_setzero_si512();
    for (int64_t i = 0; i < words; i++, weight += LANES) {
        __m512i word = _mm512_loadu_si512(weight);
#pragma GCC unroll 8
        for (int p = 0; p < pixels; p++)
            sums[p] = _mm512_add_epi32(
                sums[p], _mm512_popcnt_epi32(_mm512_xor_si512(word, WORD(inputs[p][i]))));
    }
#pragma GCC unroll 8
    for (int p = 0; p < pixels; p++) counts[p] = (ivec)sums[p];
}

/* Two words go through an adder of single bits first: it leaves one bit of their sum and the bits
   that were kept in `odd`, and only carries are counted. That is three ternary operations and one
   count for two words, where each alone would cost three operations.

   weight: [row][word][lane]; inputs: where each pixel's words begin; words: of a row; pixels: a
   constant. */
INLINE void count_different(const uint32_t *weight, const uint32_t *const inputs[PIXELS],
                            int64_t rows, int64_t words, int64_t row_stride, int pixels,
                            ivec counts[PIXELS]) {
    if (rows == 1 && words <= FEW_WORDS) {
        count_few(weight, inputs, words, pixels, counts);
        return;
    }
    __m512i odd[PIXELS], carries[PIXELS];
    const uint32_t *at[PIXELS];
    for (int p = 0; p < pixels; p++) {
        odd[p] = carries[p] = _mm512_setzero_si512();
        at[p] = inputs[p];
    }
    for (int64_t row = 0; row < rows; row++) {
        int64_t i = 0;
        for (; i + 2 <= words; i += 2, weight += 2 * LANES) {
            __m512i first = _mm512_loadu_si512(weight), second = _mm512_loadu_si512(weight + LANES);
#pragma GCC unroll 8
            for (int p = 0; p < pixels; p++) {
                __m512i half = TERNARY(odd[p], WORD(at[p][i]), first, XOR3);
                __m512i sum = TERNARY(half, WORD(at[p][i + 1]), second, XOR3);
                __m512i carry = TERNARY(half, sum, odd[p], CARRY);
                odd[p] = sum;
                carries[p] = _mm512_add_epi32(carries[p], _mm512_popcnt_epi32(carry));
            }
        }
        if (i < words) {
            __m512i last = _mm512_loadu_si512(weight);
            weight += LANES;
#pragma GCC unroll 8
            for (int p = 0; p < pixels; p++) {
                __m512i sum = TERNARY(odd[p], WORD(at[p][i]), last, XOR3);
                __m512i carry = _mm512_andnot_si512(sum, odd[p]);
                odd[p] = sum;
                carries[p] = _mm512_add_epi32(carries[p], _mm512_popcnt_epi32(carry));
            }
        }
#pragma GCC unroll 8
        for (int p = 0; p < pixels; p++) at[p] += row_stride;
    }
#pragma GCC unroll 8
    for (int p = 0; p < pixels; p++)
        counts[p] = (ivec)_mm512_add_epi32(_mm512_slli_epi32(carries[p], 1),
                                           _mm512_popcnt_epi32(odd[p]));
}

#undef XOR3
#undef CARRY
#undef WORD
#undef TERNARY

#else

enum { PIXELS = 4 };

#if defined(__AVX2__)
enum { REGISTERS = 2 };
#else
enum { REGISTERS = 4 };
#endif

enum { PARTS_HOLD = 31 }; /* words whose bits a byte can count */

typedef uint32_t part __attribute__((vector_size(64 / REGISTERS)));

/* The bits of each byte. */
INLINE part count_bytes(part x) {
#if defined(__AVX2__)
    const __m256i counts = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4)); /* of half a byte */
    __m256i low = (__m256i)(x & 0x0f0f0f0f), high = (__m256i)(x >> 4 & 0x0f0f0f0f);
    return (part)_mm256_add_epi8(_mm256_shuffle_epi8(counts, low),
                                 _mm256_shuffle_epi8(counts, high));
#elif defined(__ARM_NEON)
    return (part)vcntq_u8((uint8x16_t)x);
#elif defined(__wasm_simd128__)
    return (part)wasm_i8x16_popcnt((v128_t)x);
#else
    x = x - (x >> 1 & 0x55555555);
    x = (x & 0x33333333) + (x >> 2 & 0x33333333);
    return (x + (x >> 4)) & 0x0f0f0f0f;
#endif
}

INLINE part join_bytes(part x) {
    part pairs = (x & 0x00ff00ff) + (x >> 8 & 0x00ff00ff);
    return (pairs & 0xffff) + (pairs >> 16);
}

/* weight: [row][word][lane]; inputs: where each pixel's words begin; words: of a row; pixels: a
   constant. */
INLINE void count_different(const uint32_t *weight, const uint32_t *const inputs[PIXELS],
                            int64_t rows, int64_t words, int64_t row_stride, int pixels,
                            ivec counts[PIXELS]) {
    part totals[PIXELS][REGISTERS] = {{{0}}};
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < words;) {
            int64_t last = words - i < PARTS_HOLD ? words : i + PARTS_HOLD;
            part bytes[PIXELS][REGISTERS] = {{{0}}};
            for (; i < last; i++, weight += LANES)
                for (int p = 0; p < pixels; p++)
                    for (int r = 0; r < REGISTERS; r++) {
                        part word;
                        memcpy(&word, weight + r * (LANES / REGISTERS), sizeof word);
                        bytes[p][r] += count_bytes(word ^ inputs[p][row * row_stride + i]);
                    }
            for (int p = 0; p < pixels; p++)
                for (int r = 0; r < REGISTERS; r++) totals[p][r] += join_bytes(bytes[p][r]);
        }
    memcpy(counts, totals, sizeof totals);
}

#endif
#endif
