/* Rows that become lanes, and lanes that become rows. */
#ifndef TRITONBNN_TRANSPOSE_H
#define TRITONBNN_TRANSPOSE_H

#include "vector.h"

/* Four floats, for transposing: every machine has shuffles of four. */
typedef float quad __attribute__((vector_size(16)));
typedef int32_t quad_lanes __attribute__((vector_size(16)));

INLINE quad load_quad(const float *p) {
    quad q;
    memcpy(&q, p, sizeof q);
    return q;
}

INLINE void store_quad(float *p, quad q) { memcpy(p, &q, sizeof q); }

/* Transpose 4 x 4 floats: to[j][i] = from[i][j]. */
INLINE void transpose_quads(const float *const from[4], float *const to[4]) {
    quad a = load_quad(from[0]), b = load_quad(from[1]);
    quad c = load_quad(from[2]), d = load_quad(from[3]);
    const quad_lanes low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5},
                     second = {2, 3, 6, 7};
    quad ab_low = __builtin_shuffle(a, b, low), ab_high = __builtin_shuffle(a, b, high);
    quad cd_low = __builtin_shuffle(c, d, low), cd_high = __builtin_shuffle(c, d, high);
    store_quad(to[0], __builtin_shuffle(ab_low, cd_low, first));
    store_quad(to[1], __builtin_shuffle(ab_low, cd_low, second));
    store_quad(to[2], __builtin_shuffle(ab_high, cd_high, first));
    store_quad(to[3], __builtin_shuffle(ab_high, cd_high, second));
}

/* lanes[i][j] = rows[j][i], for rows of so many floats; 0 where there is no row (NULL). */
INLINE void rows_to_lanes(const float *const rows[LANES], int64_t size, vec *lanes) {
    static const float zeros[4];
    int64_t quads = size / 4 * 4;
    for (int64_t i = 0; i < quads; i += 4)
        for (int lane = 0; lane < LANES; lane += 4) {
            const float *from[4];
            float *to[4];
            for (int j = 0; j < 4; j++) {
                from[j] = rows[lane + j] ? rows[lane + j] + i : zeros;
                to[j] = (float *)(lanes + i + j) + lane;
            }
            transpose_quads(from, to);
        }
    for (int64_t i = quads; i < size; i++)
        for (int lane = 0; lane < LANES; lane++) lanes[i][lane] = rows[lane] ? rows[lane][i] : 0;
}

/* rows[j][i] = lanes[i][j], where there is a row. */
INLINE void lanes_to_rows(const vec *lanes, int64_t size, float *const rows[LANES]) {
    float unused[4];
    int64_t quads = size / 4 * 4;
    for (int64_t i = 0; i < quads; i += 4)
        for (int lane = 0; lane < LANES; lane += 4) {
            const float *from[4];
            float *to[4];
            for (int j = 0; j < 4; j++) {
                from[j] = (const float *)(lanes + i + j) + lane;
                to[j] = rows[lane + j] ? rows[lane + j] + i : unused;
            }
            transpose_quads(from, to);
        }
    for (int64_t i = quads; i < size; i++)
        for (int lane = 0; lane < LANES; lane++)
            if (rows[lane]) rows[lane][i] = lanes[i][lane];
}

#endif
