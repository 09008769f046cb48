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
    few total[REAL_PIXELS][LANES / FEW] = {{{0}}};
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < run; i++, weight += LANES)
            for (int f = 0; f < LANES / FEW; f++) {
                few w;
                memcpy(&w, weight + f * FEW, sizeof w);
                for (int p = 0; p < REAL_PIXELS; p++)
                    total[p][f] += w * inputs[p][row * row_stride + i];
            }
    memcpy(sums, total, sizeof total);
}

#endif
