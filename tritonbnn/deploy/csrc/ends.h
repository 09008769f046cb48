/* The steps before the first unit and after the last one. Ranges are parted among threads. */
#ifndef TRITONBNN_ENDS_H
#define TRITONBNN_ENDS_H

#include "layout.h"

/* Rows of the padded images, [image][row]. Returns whether all numbers were finite. */
INTERNAL int prepare_rows(const Network *net, const Call *call, const Layout *layout,
                          int64_t first_image, int64_t from, int64_t to);

/* Rows of the stem's output, [image][row]. */
INTERNAL void stem_rows(const Network *net, const Call *call, const Layout *layout, int64_t from,
                        int64_t to);

/* Rows of the first stream, [image][row], where the stem is pooled. */
INTERNAL void pool_rows(const Network *net, const Layout *layout, int64_t from, int64_t to);

/* The means over pixels, [image][channel]: a range of [image][block of channels]. */
INTERNAL void average(const Network *net, const Layout *layout, float *features, int64_t from,
                      int64_t to);

/* The logits of images: a range of blocks of HEAD_LANES classes. */
INTERNAL void classify(const Network *net, const float *features, float *logits, int64_t images,
                       int64_t from, int64_t to);

#endif
