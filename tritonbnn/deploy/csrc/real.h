/* The product of real numbers with the real weights of LANES output channels. */
#ifndef TRITONBNN_REAL_H
#define TRITONBNN_REAL_H

#include "lanes.h"

#if defined(__AVX512F__)
enum { REAL_PIXELS = 8 };
#else
enum { REAL_PIXELS = 4 };
#endif

/* weight: [row][number of the run][lane]; inputs: where each pixel's first run begins. */
INLINE void real_product(const float *weight, const float *const inputs[REAL_PIXELS], int64_t rows,
                         int64_t run, int64_t row_stride, vec sums[REAL_PIXELS]) {
    vec total[REAL_PIXELS];
    for (int p = 0; p < REAL_PIXELS; p++) total[p] = splat(0);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < run; i++, weight += LANES) {
            vec w = load(weight);
            for (int p = 0; p < REAL_PIXELS; p++) total[p] += w * inputs[p][row * row_stride + i];
        }
    memcpy(sums, total, sizeof total);
}

#endif
