/* Rows that become lanes, and lanes that become rows. */
#ifndef TRITONBNN_TRANSPOSE_H
#define TRITONBNN_TRANSPOSE_H

#include "vector.h"

/* A register holds a quad, four floats side by side, of each of so many rows. */
enum { QUADS = LANES / 4 / PARTS };

/* Join the quads of rows 0, 4, 8 and 12, as far as a register holds so many. The other direction
   takes them apart. */
INLINE part join_quads(const float *const rows[LANES], int64_t i) {
#if defined(__AVX512F__)
    __m512 joined = _mm512_castps128_ps512(_mm_loadu_ps(rows[0] + i));
    joined = _mm512_insertf32x4(joined, _mm_loadu_ps(rows[4] + i), 1);
    joined = _mm512_insertf32x4(joined, _mm_loadu_ps(rows[8] + i), 2);
    return (part)_mm512_insertf32x4(joined, _mm_loadu_ps(rows[12] + i), 3);
#elif defined(__AVX__)
    __m256 joined = _mm256_castps128_ps256(_mm_loadu_ps(rows[0] + i));
    return (part)_mm256_insertf128_ps(joined, _mm_loadu_ps(rows[4] + i), 1);
#else
    return load_part(rows[0] + i);
#endif
}

INLINE void split_quads(part joined, float *const to[QUADS]) {
#if defined(__AVX512F__)
    _mm_storeu_ps(to[0], _mm512_castps512_ps128((__m512)joined));
    _mm_storeu_ps(to[1], _mm512_extractf32x4_ps((__m512)joined, 1));
    _mm_storeu_ps(to[2], _mm512_extractf32x4_ps((__m512)joined, 2));
    _mm_storeu_ps(to[3], _mm512_extractf32x4_ps((__m512)joined, 3));
#elif defined(__AVX__)
    _mm_storeu_ps(to[0], _mm256_castps256_ps128((__m256)joined));
    _mm_storeu_ps(to[1], _mm256_extractf128_ps((__m256)joined, 1));
#else
    memcpy(to[0], &joined, sizeof joined);
#endif
}

/* Of two registers, quad by quad: the numbers of a and b named by a mask of four, b's from 4 on. */
#if defined(__AVX512F__)
#define MIX(a, b, i, j, k, l)                                                                   \
    __builtin_shuffle(a, b, (part_bits){MIX4(i, j, k, l, 0, 12), MIX4(i, j, k, l, 4, 12),       \
                                        MIX4(i, j, k, l, 8, 12), MIX4(i, j, k, l, 12, 12)})
#elif defined(__AVX__)
#define MIX(a, b, i, j, k, l)                                                                   \
    __builtin_shuffle(a, b, (part_bits){MIX4(i, j, k, l, 0, 4), MIX4(i, j, k, l, 4, 4)})
#else
#define MIX(a, b, i, j, k, l) __builtin_shuffle(a, b, (part_bits){i, j, k, l})
#endif
#define MIX1(i, first, beyond) (i) + (first) + ((i) < 4 ? 0 : (beyond))
#define MIX4(i, j, k, l, first, beyond)                                                         \
    MIX1(i, first, beyond), MIX1(j, first, beyond), MIX1(k, first, beyond), MIX1(l, first, beyond)

/* Transpose each 4 x 4 block of four registers: number j of quad i becomes number i of quad j. */
INLINE void transpose_blocks(part v[4]) {
    part ab_low = MIX(v[0], v[1], 0, 4, 1, 5), ab_high = MIX(v[0], v[1], 2, 6, 3, 7);
    part cd_low = MIX(v[2], v[3], 0, 4, 1, 5), cd_high = MIX(v[2], v[3], 2, 6, 3, 7);
    v[0] = MIX(ab_low, cd_low, 0, 1, 4, 5);
    v[1] = MIX(ab_low, cd_low, 2, 3, 6, 7);
    v[2] = MIX(ab_high, cd_high, 0, 1, 4, 5);
    v[3] = MIX(ab_high, cd_high, 2, 3, 6, 7);
}

/* lanes[i][j] = rows[j][i], for rows of so many floats; 0 where there is no row (NULL). */
INLINE void rows_to_lanes(const float *const rows[LANES], int64_t size, vec *lanes) {
    const float *some = 0, *from[LANES];
    ivec there;
    for (int lane = 0; lane < LANES; lane++) {
        some = rows[lane] ? rows[lane] : some;
        there[lane] = rows[lane] ? -1 : 0;
    }
    if (!some) {
        memset(lanes, 0, size * sizeof *lanes);
        return;
    }
    for (int lane = 0; lane < LANES; lane++) /* what is read of another row is set to 0 */
        from[lane] = rows[lane] ? rows[lane] : some;
    int64_t quads = size / 4 * 4;
    for (int64_t i = 0; i < quads; i += 4)
        EACH(r, PARTS) {
            part v[4];
            EACH(j, 4) v[j] = join_quads(from + r * 4 * QUADS + j, i);
            transpose_blocks(v);
            EACH(j, 4)
                ((part *)(lanes + i + j))[r] = (part)((part_bits)v[j] & ((part_bits *)&there)[r]);
        }
    for (int64_t i = quads; i < size; i++)
        for (int lane = 0; lane < LANES; lane++) lanes[i][lane] = there[lane] ? from[lane][i] : 0;
}

INLINE void write_quads_of(const vec *lanes, int64_t i, float *const rows[LANES], int all) {
    float unused[4];
    EACH(r, PARTS) {
        part v[4];
        EACH(j, 4) v[j] = ((const part *)(lanes + i + j))[r];
        transpose_blocks(v);
        EACH(j, 4) {
            float *to[QUADS];
            EACH(q, QUADS) {
                float *row = rows[4 * (r * QUADS + q) + j];
                to[q] = all || row ? row + i : unused;
            }
            split_quads(v[j], to);
        }
    }
}

/* rows[j][i] = lanes[i][j], where there is a row. */
INLINE void lanes_to_rows(const vec *lanes, int64_t size, float *const rows[LANES]) {
    int64_t quads = size / 4 * 4;
    int all = 1;
    for (int lane = 0; lane < LANES; lane++) all &= rows[lane] != 0;
    if (all) /* no row is asked for in the loop */
        for (int64_t i = 0; i < quads; i += 4) write_quads_of(lanes, i, rows, 1);
    else
        for (int64_t i = 0; i < quads; i += 4) write_quads_of(lanes, i, rows, 0);
    for (int64_t i = quads; i < size; i++)
        for (int lane = 0; lane < LANES; lane++)
            if (rows[lane]) rows[lane][i] = lanes[i][lane];
}

#endif
