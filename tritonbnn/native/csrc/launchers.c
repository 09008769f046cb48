/* The passes of a unit one at a time, as Python's launchers call them. */
#include "passes.h"
#include "vector.h"

/* A pointwise activation is a unit without a shortcut: x is its a, and scale is 1. */
static Unit rprelu(void *x, int64_t type, int64_t pixels, int64_t channels) {
    return (Unit){
        .images = pixels,
        .height = 1,
        .width = 1,
        .channels = channels,
        .a = {x, (Type)type},
        .stream = {0, (Type)type},
        .shortcut = NO_SHORTCUT,
    };
}

EXPORT void tritonbnn_rprelu_forward(void *x, int64_t type, int64_t pixels, int64_t channels,
                                     const float *shift_in, const float *slope,
                                     const float *shift_out, void *z, int64_t threads) {
    Unit unit = rprelu(x, type, pixels, channels);
    unit.shift_mid = shift_in;
    unit.slope = slope;
    unit.shift_out = shift_out;
    pass_forward(&unit, (Numbers){z, (Type)type}, 0, 0, threads);
}

/* sums: (4, channels), of which those to shift_in, slope and shift_out are 0, 2 and 3. */
EXPORT void tritonbnn_rprelu_backward(void *grad, void *x, int64_t type, int64_t pixels,
                                      int64_t channels, const float *shift_in,
                                      const float *slope, void *dx, float *sums,
                                      int64_t threads) {
    Unit unit = rprelu(x, type, pixels, channels);
    unit.shift_mid = shift_in;
    unit.slope = slope;
    pass_sums(&unit, (Numbers){grad, (Type)type}, (Numbers){dx, (Type)type}, sums, threads);
}

EXPORT void tritonbnn_channel_moments(void *a, int64_t type, int64_t pixels, int64_t channels,
                                      double *mean, double *variance, int64_t threads) {
    pass_moments((Numbers){a, (Type)type}, pixels, channels, mean, variance, threads);
}

/* type is the stream's and z's. signs may be NULL. */
EXPORT void tritonbnn_unit_forward(void *a, int64_t a_type, void *stream, int64_t type,
                                   int64_t images, int64_t height, int64_t width,
                                   int64_t channels, int64_t shortcut, const float *mean,
                                   const float *scale, const float *offset,
                                   const float *shift_mid, const float *slope,
                                   const float *shift_out, const float *next_shift, void *z,
                                   uint32_t *signs, int64_t threads) {
    Unit unit = {
        images, height, width, channels, {a, (Type)a_type}, {stream, (Type)type},
        (Shortcut)shortcut, mean, scale, offset, shift_mid, slope, shift_out,
    };
    pass_forward(&unit, (Numbers){z, (Type)type}, signs, next_shift, threads);
}

/* type is the stream's, grad's and du's. sums: (4, channels). */
EXPORT void tritonbnn_unit_activation_backward(
    void *grad, void *a, int64_t a_type, void *stream, int64_t type, int64_t images,
    int64_t height, int64_t width, int64_t channels, int64_t shortcut, const float *mean,
    const float *scale, const float *offset, const float *shift_mid, const float *slope, void *du,
    float *sums, int64_t threads) {
    Unit unit = {
        images, height, width, channels, {a, (Type)a_type}, {stream, (Type)type},
        (Shortcut)shortcut, mean, scale, offset, shift_mid, slope, 0,
    };
    pass_sums(&unit, (Numbers){grad, (Type)type}, (Numbers){du, (Type)type}, sums, threads);
}

/* type is du's and dy's. */
EXPORT void tritonbnn_unit_norm_backward(void *du, int64_t type, void *a, int64_t a_type,
                                         int64_t pixels, int64_t channels, const float *du_scale,
                                         const float *a_scale, const float *constant, void *dy,
                                         int64_t threads) {
    Unit unit = rprelu(a, a_type, pixels, channels); /* without a slope: its gradient is du */
    Numbers none = {0, FLOAT32};
    pass_apply(&unit, (Numbers){du, (Type)type}, du_scale, a_scale, constant,
               (Numbers){dy, (Type)type}, none, threads);
}

/* du: the gradient to z, or NULL for no shortcut; dx has x's type. */
EXPORT void tritonbnn_sign_backward(void *dsigns, int64_t dsigns_type, void *x, int64_t type,
                                    void *du, int64_t du_type, int64_t images, int64_t height,
                                    int64_t width, int64_t channels, int64_t shortcut,
                                    const float *shift, void *dx, float *dshift,
                                    int64_t threads) {
    Input input = {
        images, height, width, channels, {x, (Type)type}, {dsigns, (Type)dsigns_type},
        {du, (Type)du_type}, (Shortcut)shortcut, shift,
    };
    pass_input(&input, (Numbers){dx, (Type)type}, dshift, threads);
}
