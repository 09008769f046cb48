/* A square convolution over NHWC images, and how its numbers are read and written. */
#ifndef TRITONBNN_GEOMETRY_H
#define TRITONBNN_GEOMETRY_H

#include "passes.h"
#include "vector.h"

typedef struct {
    int64_t images, height, width, channels; /* of the input */
    int64_t out_height, out_width, out_channels;
    int64_t kernel_size, stride, padding;
} geometry;

typedef struct {
    int64_t out_channel, channel, row, column; /* strides of a weight, in elements */
} weight_strides;

#define SIGNS_OF_WORD 32

INLINE int64_t packed_words(int64_t channels) {
    return (channels + SIGNS_OF_WORD - 1) / SIGNS_OF_WORD;
}

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* A float or a bfloat16 of an array, as a float. */
INLINE float number_at(const void *numbers, int64_t type, int64_t index) {
    if (type == FLOAT32) return ((const float *)numbers)[index];
    uint32_t bits = (uint32_t)((const uint16_t *)numbers)[index] << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* At most 16 numbers of an array as a vector; lanes past the count are 0. */
INLINE vec load_some(const void *numbers, int64_t type, int64_t index, int64_t count) {
    if (count >= LANES) {
        if (type == FLOAT32) return load((const float *)numbers + index);
        return load_bfloat16((const bfloat16 *)numbers + index);
    }
    vec v = splat(0);
    for (int64_t lane = 0; lane < count; lane++) v[lane] = number_at(numbers, type, index + lane);
    return v;
}

INLINE void store_some(void *numbers, int64_t type, int64_t index, vec v, int64_t count) {
    if (type == FLOAT32) {
        if (count >= LANES)
            store((float *)numbers + index, v);
        else
            memcpy((float *)numbers + index, &v, count * sizeof(float));
        return;
    }
    bfloat16 rounded[LANES];
    store_bfloat16(rounded, v);
    memcpy((bfloat16 *)numbers + index, rounded, min64(count, LANES) * sizeof(bfloat16));
}

#endif
