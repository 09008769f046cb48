/* A whole unit, forward and backward, in one call each: its passes and products in a row.

   u = gamma * xhat + beta + shortcut, z = PReLU(u + shift_mid) + shift_out, where xhat is a, the
   convolution of signs, normalised. What is computed per channel is computed in double, as
   tritonbnn/ops/norm.py does, whose names these are, and rounded once. */
#include <math.h>

#include "clock.h"
#include "passes.h"
#include "products.h"
#include "workspace.h"

/* Python fills this in: tritonbnn/native/whole.py. Pointers may be NULL where it is said. */
typedef struct {
    geometry g;
    weight_strides strides;
    int64_t type, a_type, shortcut;
    double eps;
    /* The unit's operands. */
    void *x;
    const float *weight, *gamma, *beta; /* weight: NULL where packed and alpha are given */
    const float *shift_in, *shift_mid, *slope, *shift_out, *next_shift; /* each may be NULL */
    void *residual;                            /* the shortcut's own tensor, or NULL */
    const float *given_mean, *given_variance;  /* NULL for the batch's own */
    /* What forward leaves for backward. */
    uint32_t *signs;
    int64_t signs_are_packed;
    uint32_t *packed; /* and alpha: NULL for a real weight */
    float *alpha;
    void *a;        /* NULL: computed again */
    float *vectors; /* centre, scale, offset, rest, invstd, share */
    /* What forward returns. */
    void *z;
    uint32_t *next_signs; /* NULL if not wanted */
    float *mean, *variance;
    /* What backward takes and returns. */
    void *grad;
    void *dx;
    float *dweight; /* NULL if not wanted */
    float *dgamma, *dbeta, *dshift_in;
    float *dshift_mid, *dslope, *dshift_out; /* where there is a slope */
    void *dresidual; /* where there is a residual */
    float *dy, *du;  /* where a real weight's gradient to the input is computed between two calls */
    float *dsigns;
    int64_t wants_input; /* whether dx or dshift_in is wanted */
} unit;

enum { CENTRE, SCALE, OFFSET, REST, INVSTD, SHARE };

INLINE int64_t outputs(const unit *u) {
    return u->g.images * u->g.out_height * u->g.out_width;
}

INLINE float *vector_of(const unit *u, int which) {
    return u->vectors + which * u->g.out_channels;
}

static int64_t bytes_of(int64_t type) { return type == INT16 || type == BFLOAT16 ? 2 : 4; }

/* What a pass has to read and write, each once. */
static int64_t bytes_moved(const unit *u, Clocked pass) {
    const geometry *g = &u->g;
    int64_t pixels = g->images * g->height * g->width, taps = g->kernel_size * g->kernel_size;
    int64_t x = pixels * g->channels * bytes_of(u->type), dsigns = pixels * g->channels * 4;
    int64_t signs = pixels * words_of(g->channels) * 4;
    int64_t weight = g->out_channels * taps * g->channels * 4;
    int64_t packed = g->out_channels * taps * words_of(g->channels) * 4;
    int64_t z = outputs(u) * g->out_channels * bytes_of(u->type);
    int64_t a = outputs(u) * g->out_channels * bytes_of(u->a_type);
    int64_t next_signs = u->next_signs ? outputs(u) * words_of(g->out_channels) * 4 : 0;
    int64_t dy = outputs(u) * g->out_channels * 4, du = u->dresidual ? z : dy;
    int64_t stream = u->residual ? z : x;
    int64_t activation = a + z + (u->slope ? stream : 0); /* all that backward reads of it */
    switch (pass) {
    case CLOCK_WEIGHT: return weight + packed;
    case CLOCK_SIGNS: return x + signs;
    case CLOCK_PRODUCT: return signs + (u->packed ? packed : weight) + a;
    case CLOCK_MOMENTS: return a;
    case CLOCK_ACTIVATION: return a + stream + z + next_signs;
    case CLOCK_SUMS: return activation;
    case CLOCK_APPLY: return activation + dy + du;
    case CLOCK_INPUT_GRAD: return dy + packed + dsigns;
    case CLOCK_WEIGHT_GRAD: return dy + signs + (u->packed ? 2 : 1) * weight; /* to clip it */
    case CLOCK_INPUT: return x + dsigns + (u->residual ? 0 : du) + x;
    default: return 0;
    }
}

/* Stop the clock of a pass that began then, if it is on. */
INLINE void clock_stop(const unit *u, Clocked pass, int64_t since) {
    if (!since) return;
    int64_t products = outputs(u) * u->g.out_channels * u->g.kernel_size * u->g.kernel_size *
                       u->g.channels;
    int by_bits = pass == CLOCK_PRODUCT && u->packed;
    int by_table = pass == CLOCK_INPUT_GRAD || pass == CLOCK_WEIGHT_GRAD ||
                   (pass == CLOCK_PRODUCT && !u->packed);
    Work work = {bytes_moved(u, pass), by_table ? products : 0, by_bits ? products : 0};
    tritonbnn_clock_add(pass, since, work);
}

/* The convolution before its scale: in memory of the unit, or of this thread. */
static void *convolved(const unit *u, double *sum, double *square, int64_t threads) {
    int64_t bytes = outputs(u) * u->g.out_channels * bytes_of(u->a_type);
    void *a = u->a ? u->a : tritonbnn_workspace(WORKSPACE_CONVOLVED, bytes);
    int64_t since = clock_start();
    if (u->packed)
        tritonbnn_conv_packed(u->signs, u->packed, 0, a, u->a_type, sum, square, &u->g, threads);
    else
        tritonbnn_conv_real(u->signs, u->weight, a, u->a_type, &u->g, threads);
    clock_stop(u, CLOCK_PRODUCT, since);
    return a;
}

static void normalise_by_batch(const unit *u, int64_t c, double mean, double spread) {
    double alpha = u->alpha ? u->alpha[c] : 1, count = (double)larger(outputs(u), 1);
    double variance = alpha * alpha * spread, invstd = 1 / sqrt(variance + u->eps);
    vector_of(u, CENTRE)[c] = (float)mean;
    vector_of(u, SCALE)[c] = (float)(u->gamma[c] * invstd * alpha);
    vector_of(u, OFFSET)[c] = u->beta[c];
    vector_of(u, REST)[c] = 0;
    vector_of(u, INVSTD)[c] = (float)invstd;
    vector_of(u, SHARE)[c] = (float)(1 / count);
    u->mean[c] = (float)(alpha * mean);
    u->variance[c] = (float)(variance * (count / (count > 2 ? count - 1 : 1)));
}

static void normalise_by_given(const unit *u, int64_t c) {
    double alpha = u->alpha ? u->alpha[c] : 1, rest = u->given_mean[c];
    double invstd = 1 / sqrt(u->given_variance[c] + u->eps), gain = u->gamma[c] * invstd;
    vector_of(u, CENTRE)[c] = 0;
    vector_of(u, SCALE)[c] = (float)(gain * alpha);
    vector_of(u, OFFSET)[c] = (float)(u->beta[c] - gain * rest);
    vector_of(u, REST)[c] = (float)rest;
    vector_of(u, INVSTD)[c] = (float)invstd;
    vector_of(u, SHARE)[c] = 0;
    u->mean[c] = u->given_mean[c];
    u->variance[c] = u->given_variance[c];
}

/* Convolve, and find by what to normalise. */
static void *normalised(const unit *u, int64_t threads) {
    int64_t channels = u->g.out_channels;
    double *first = tritonbnn_workspace(WORKSPACE_MOMENTS, 2 * channels * sizeof *first);
    double *second = first + channels;
    int by_batch = !u->given_mean;
    int counted = by_batch && u->packed; /* the moments of integers come with the product */
    void *a = convolved(u, counted ? first : 0, counted ? second : 0, threads);
    if (by_batch && !counted) {
        int64_t since = clock_start();
        pass_moments((Numbers){a, u->a_type}, outputs(u), channels, first, second, threads);
        clock_stop(u, CLOCK_MOMENTS, since);
    }
    double count = (double)larger(outputs(u), 1);
    for (int64_t c = 0; c < channels; c++) {
        if (!by_batch) {
            normalise_by_given(u, c);
        } else if (counted) {
            double mean = first[c] / count, spread = second[c] / count - mean * mean;
            normalise_by_batch(u, c, mean, spread < 0 ? 0 : spread);
        } else {
            normalise_by_batch(u, c, first[c], second[c]);
        }
    }
    return a;
}

/* What the passes of a unit share. */
static Unit passes_of(const unit *u, void *a) {
    Unit passes = {
        .images = u->g.images,
        .height = u->g.out_height,
        .width = u->g.out_width,
        .channels = u->g.out_channels,
        .a = {a, u->a_type},
        .stream = {u->residual ? u->residual : u->x, u->type},
        .shortcut = u->residual ? IDENTITY : u->shortcut,
        .mean = vector_of(u, CENTRE),
        .scale = vector_of(u, SCALE),
        .offset = vector_of(u, OFFSET),
        .shift_mid = u->shift_mid,
        .slope = u->slope,
        .shift_out = u->shift_out,
    };
    return passes;
}

static void pack_input(const unit *u, int64_t threads) {
    const geometry *g = &u->g;
    int64_t since = clock_start();
    tritonbnn_pack_signs(u->x, u->type, u->shift_in, g->images * g->height * g->width,
                         g->channels, u->signs, threads);
    clock_stop(u, CLOCK_SIGNS, since);
}

static void pack_weight(const unit *u, int64_t threads) {
    const geometry *g = &u->g;
    int64_t since = clock_start();
    tritonbnn_pack_weight((void *)u->weight, FLOAT32, g->out_channels, g->channels, g->kernel_size,
                          g->kernel_size, u->strides.out_channel, u->strides.channel,
                          u->strides.row, u->strides.column, u->packed, u->alpha, threads);
    clock_stop(u, CLOCK_WEIGHT, since);
}

EXPORT void tritonbnn_unit_whole_forward(const unit *u, int64_t threads) {
    if (!u->signs_are_packed) pack_input(u, threads);
    if (u->packed && u->weight) pack_weight(u, threads);
    Unit passes = passes_of(u, normalised(u, threads));
    int64_t since = clock_start();
    pass_forward(&passes, (Numbers){u->z, u->type}, u->next_signs, u->next_shift, threads);
    clock_stop(u, CLOCK_ACTIVATION, since);
}

/* The gradients of what is per channel, from their sums; and the gradient to a as
   du_scale * du + a_scale * a + constant. */
static void find_coefficients(const unit *u, const float *sums, float *du_scale, float *a_scale,
                              float *constant) {
    int64_t channels = u->g.out_channels;
    for (int64_t c = 0; c < channels; c++) {
        double invstd = vector_of(u, INVSTD)[c], share = vector_of(u, SHARE)[c];
        double slope = invstd * (u->alpha ? u->alpha[c] : 1); /* of xhat over a */
        double du_sum = sums[c], du_a_sum = sums[channels + c];
        double dgamma = slope * du_a_sum - invstd * vector_of(u, REST)[c] * du_sum;
        double gain = u->gamma[c] * invstd, by_a = -gain * slope * dgamma * share;
        u->dgamma[c] = (float)dgamma;
        u->dbeta[c] = sums[c];
        du_scale[c] = (float)gain;
        a_scale[c] = (float)by_a;
        constant[c] = (float)(-gain * du_sum * share - by_a * vector_of(u, CENTRE)[c]);
    }
    if (!u->slope) return;
    memcpy(u->dshift_mid, sums, channels * sizeof *sums);
    memcpy(u->dslope, sums + 2 * channels, channels * sizeof *sums);
    memcpy(u->dshift_out, sums + 3 * channels, channels * sizeof *sums);
}

/* From the gradient to z to the one to the convolution's scaled output, and du on the way. */
static void activation_backward(const unit *u, float *dy, Numbers du, int64_t threads) {
    int64_t channels = u->g.out_channels;
    float *du_scale = tritonbnn_workspace(WORKSPACE_MOMENTS, 7 * channels * sizeof *du_scale);
    float *a_scale = du_scale + channels, *constant = a_scale + channels;
    float *sums = constant + channels;
    Numbers grad = {u->grad, u->type}, none = {0, FLOAT32};
    Unit passes = passes_of(u, u->a ? u->a : convolved(u, 0, 0, threads));
    int64_t since = clock_start();
    pass_sums(&passes, grad, none, sums, threads);
    clock_stop(u, CLOCK_SUMS, since);
    find_coefficients(u, sums, du_scale, a_scale, constant);
    since = clock_start();
    pass_apply(&passes, grad, du_scale, a_scale, constant, (Numbers){dy, FLOAT32}, du, threads);
    clock_stop(u, CLOCK_APPLY, since);
}

/* From the convolution's output back to the weight, the shift and x. */
static void convolution_backward(const unit *u, const float *dy, const float *dsigns, Numbers du,
                                 int64_t threads) {
    const geometry *g = &u->g;
    int64_t since = clock_start();
    if (u->dweight) {
        tritonbnn_weight_grad(dy, FLOAT32, u->signs, u->dweight, u->packed ? u->weight : 0, g,
                              &u->strides, threads);
        clock_stop(u, CLOCK_WEIGHT_GRAD, since);
    }
    if (!u->wants_input) return;
    Input input = {
        .images = g->images,
        .height = g->height,
        .width = g->width,
        .channels = g->channels,
        .x = {u->x, u->type},
        .dsigns = {(void *)dsigns, FLOAT32},
        .du = u->residual ? (Numbers){0, FLOAT32} : du,
        .shortcut = u->shortcut,
        .shift = u->shift_in,
    };
    since = clock_start();
    pass_input(&input, (Numbers){u->dx, u->type}, u->dshift_in, threads);
    clock_stop(u, CLOCK_INPUT, since);
}

static Numbers du_of(const unit *u) {
    if (u->dresidual) return (Numbers){u->dresidual, u->type};
    if (u->du) return (Numbers){u->du, FLOAT32};
    return (Numbers){
        tritonbnn_workspace(WORKSPACE_DU, outputs(u) * u->g.out_channels * sizeof(float)), FLOAT32};
}

EXPORT void tritonbnn_unit_whole_backward(const unit *u, int64_t threads) {
    const geometry *g = &u->g;
    float *dy = tritonbnn_workspace(WORKSPACE_DY, outputs(u) * g->out_channels * sizeof *dy);
    Numbers du = du_of(u);
    activation_backward(u, dy, du, threads);
    float *dsigns = u->dx; /* it is overwritten in place */
    if (u->wants_input) {
        int64_t inputs = g->images * g->height * g->width * g->channels;
        if (u->type != FLOAT32)
            dsigns = tritonbnn_workspace(WORKSPACE_DSIGNS, inputs * sizeof *dsigns);
        int64_t since = clock_start();
        tritonbnn_input_grad(dy, u->packed, u->alpha, dsigns, g, threads);
        clock_stop(u, CLOCK_INPUT_GRAD, since);
    }
    convolution_backward(u, dy, dsigns, du, threads);
}

/* For a real weight: up to the gradient to the convolution's output, into u->dy and u->du. */
EXPORT void tritonbnn_unit_upper_backward(const unit *u, int64_t threads) {
    activation_backward(u, u->dy, du_of(u), threads);
}

/* For a real weight: from there on, with the gradient to the signs in u->dsigns. */
EXPORT void tritonbnn_unit_lower_backward(const unit *u, int64_t threads) {
    convolution_backward(u, u->dy, u->dsigns, du_of(u), threads);
}
