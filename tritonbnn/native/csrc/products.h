/* The products of a binary convolution, each described where it is defined. */
#ifndef TRITONBNN_PRODUCTS_H
#define TRITONBNN_PRODUCTS_H

#include "geometry.h"

void tritonbnn_pack_signs(void *x, int64_t type, const float *shift, int64_t pixels,
                          int64_t channels, uint32_t *signs, int64_t threads);

void tritonbnn_pack_weight(void *weight, int64_t type, int64_t filters, int64_t channels,
                           int64_t height, int64_t width, int64_t filter_stride,
                           int64_t channel_stride, int64_t row_stride, int64_t column_stride,
                           uint32_t *packed, float *alpha, int64_t threads);

void tritonbnn_conv_packed(const uint32_t *signs, const uint32_t *weight, const float *alpha,
                           void *result, int64_t type, double *sum, double *square,
                           const geometry *g, int64_t threads);

void tritonbnn_conv_real(const uint32_t *signs, const float *weight, void *result, int64_t type,
                         const geometry *g, int64_t threads);

void tritonbnn_input_grad(const float *grad, const uint32_t *weight, const float *alpha,
                          float *result, const geometry *g, int64_t threads);

void tritonbnn_weight_grad(const void *grad, int64_t grad_type, const uint32_t *signs,
                           float *result, const float *clip_by, const geometry *g,
                           const weight_strides *strides, int64_t threads);

#endif
