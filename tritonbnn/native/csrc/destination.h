/* A weight's gradient, from sums by 16 output channels into the weight's own layout. */
#ifndef TRITONBNN_DESTINATION_H
#define TRITONBNN_DESTINATION_H

#include "geometry.h"
#include "transpose.h"

#define MOST_TAPS 9
#define BLOCK 64 /* channels that are transposed at a time, so that they stay in the first cache */

typedef struct {
    float *values;
    const float *clip_by; /* the weight, beyond +-1 of which its gradient is 0; or NULL */
    weight_strides strides;
} destination;

/* The gradient of a weight: 0 where the weight is beyond +-1, or no number. */
INLINE float clipped(const destination *d, int64_t at, float grad) {
    float w = d->clip_by ? d->clip_by[at] : 0;
    return w <= 1 && w >= -1 ? grad : 0;
}

/* Four channels that lie side by side, of 16 output channels. */
INLINE void write_quads(const destination *d, int64_t at, const vec *sums) {
    float values[LANES][4], *rows[LANES];
    for (int lane = 0; lane < LANES; lane++) rows[lane] = values[lane];
    write_quads_of(sums, 0, rows, 1);
    for (int lane = 0; lane < LANES; lane++, at += d->strides.out_channel)
        for (int c = 0; c < 4; c++) d->values[at + c] = clipped(d, at + c, values[lane][c]);
}

/* Write the sums of a tap, [channel] by lanes, of 16 output channels from out on. */
static inline void write_tap(const geometry *g, const destination *d, int64_t out, int64_t tap,
                             const vec *sums) {
    weight_strides s = d->strides;
    int64_t lanes = smaller(LANES, g->out_channels - out), k = g->kernel_size;
    int64_t at = out * s.out_channel + tap / k * s.row + tap % k * s.column;
    int64_t quads = s.channel == 1 && lanes == LANES ? g->channels / 4 * 4 : 0;
    for (int64_t c = 0; c < quads; c += 4) write_quads(d, at + c, sums + c);
    for (int64_t first = quads; first < g->channels; first += BLOCK)
        for (int64_t lane = 0; lane < lanes; lane++)
            for (int64_t c = first; c < smaller(first + BLOCK, g->channels); c++) {
                int64_t i = at + lane * s.out_channel + c * s.channel;
                d->values[i] = clipped(d, i, sums[c][lane]);
            }
}

/* Whether a channel's taps lie side by side, as torch lays a weight out by itself. */
INLINE int kernels_follow(const geometry *g, const destination *d) {
    weight_strides s = d->strides;
    int64_t k = g->kernel_size, size = k * k;
    return k > 1 && size <= MOST_TAPS && s.column == 1 && s.row == k && s.channel == size &&
           s.out_channel == g->channels * size;
}

/* Write the sums of all taps, [tap][channel] by lanes, where they lie so. */
static inline void write_kernels(const geometry *g, const destination *d, int64_t out,
                                 const vec *sums) {
    int64_t taps = g->kernel_size * g->kernel_size, size = g->channels * taps;
    int64_t lanes = smaller(LANES, g->out_channels - out);
    float *values = d->values + out * size, *rows[LANES];
    vec kernel[MOST_TAPS];
    for (int64_t c = 0; c < g->channels; c++) {
        for (int64_t tap = 0; tap < taps; tap++)
            memcpy(kernel + tap, sums + tap * g->channels + c, sizeof(vec));
        for (int64_t lane = 0; lane < LANES; lane++)
            rows[lane] = lane < lanes ? values + lane * size + c * taps : 0;
        lanes_to_rows(kernel, taps, rows);
    }
    if (!d->clip_by) return;
    const float *weight = d->clip_by + out * size;
    #pragma omp simd
    for (int64_t i = 0; i < lanes * size; i++)
        values[i] = weight[i] <= 1 && weight[i] >= -1 ? values[i] : 0;
}

#endif
