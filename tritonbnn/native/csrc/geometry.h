/* A square convolution over NHWC images. */
#ifndef TRITONBNN_GEOMETRY_H
#define TRITONBNN_GEOMETRY_H

#include "numbers.h"

typedef struct {
    int64_t images, height, width, channels; /* of the input */
    int64_t out_height, out_width, out_channels;
    int64_t kernel_size, stride, padding;
} geometry;

typedef struct {
    int64_t out_channel, channel, row, column; /* strides of a weight, in elements */
} weight_strides;

#endif
