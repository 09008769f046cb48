/* Mean and variance per channel. */
#include <stdlib.h>

#include "tiles.h"

/* The sums of a and of its square. */
INLINE void add_moments(Numbers a, Type type, const Tile *tile) {
    double *sum = tile->wide_sums, *square = sum + tile->period;
    int64_t first = tile->pixel * tile->channels;
    for (int64_t at = 0; at < tile->floats; at += tile->period) {
        int64_t count = smaller(tile->period, tile->floats - at);
        #pragma omp simd
        for (int64_t i = 0; i < count; i++) {
            double value = wide_number(a.data, type, first + at + i);
            sum[i] += value;
            square[i] += value * value;
        }
    }
}

static void moments_tile(const void *pass, const Tile *tile) {
    const Numbers *a = pass;
    switch (a->type) {
    case BFLOAT16:
        add_moments(*a, BFLOAT16, tile);
        break;
    case INT16:
        add_moments(*a, INT16, tile);
        break;
    case INT32:
        add_moments(*a, INT32, tile);
        break;
    default:
        add_moments(*a, FLOAT32, tile);
    }
}

void pass_moments(Numbers a, int64_t pixels, int64_t channels, double *mean, double *variance,
                  int64_t threads) {
    Pass pass = {
        .tile = moments_tile,
        .pass = &a,
        .pixels = pixels,
        .channels = channels,
        .wide_sums = 2,
    };
    double *totals = allocate(2 * channels * (int64_t)sizeof(double));
    run_pass(&pass, totals, threads);
    double count = (double)larger(pixels, 1); /* of nothing, both are 0 */
    for (int64_t c = 0; c < channels; c++) {
        mean[c] = totals[c] / count;
        double spread = totals[channels + c] / count - mean[c] * mean[c];
        variance[c] = spread < 0 ? 0 : spread; /* a NaN stays one */
    }
    free(totals);
}
