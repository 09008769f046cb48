/* A convolution of signs that stands alone, forward and backward, in one call each. */
#include "passes.h"
#include "products.h"
#include "workspace.h"

/* Python fills this in: tritonbnn/native/layer.py. All numbers are float. */
typedef struct {
    geometry g;
    weight_strides strides;
    float *x;
    const float *shift;  /* NULL for 0 */
    const float *weight; /* NULL where packed and alpha are given */
    uint32_t *signs, *packed;
    float *alpha;
    float *y;
    /* What backward takes and returns. */
    const float *grad;
    float *dweight;        /* NULL if not wanted */
    float *dx;             /* NULL if neither it nor dshift is wanted */
    float *dshift;         /* there where dx is */
    int64_t may_be_binary; /* whether x's gradient passes where all of x is +1 or -1 */
} layer;

INLINE int64_t pixels_of(const layer *l) { return l->g.images * l->g.height * l->g.width; }

EXPORT void tritonbnn_layer_forward(const layer *l, int64_t threads) {
    const geometry *g = &l->g;
    tritonbnn_pack_signs(l->x, FLOAT32, l->shift, pixels_of(l), g->channels, l->signs, threads);
    if (l->weight)
        tritonbnn_pack_weight((void *)l->weight, FLOAT32, g->out_channels, g->channels,
                              g->kernel_size, g->kernel_size, l->strides.out_channel,
                              l->strides.channel, l->strides.row, l->strides.column, l->packed,
                              l->alpha, threads);
    tritonbnn_conv_packed(l->signs, l->packed, l->alpha, l->y, FLOAT32, 0, 0, g, threads);
}

/* Real numbers nearly always show at the first that they are. Then the rest is not read. */
static int is_binary(const float *x, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (x[i] != 1 && x[i] != -1) return 0;
    return 1;
}

EXPORT void tritonbnn_layer_backward(const layer *l, int64_t threads) {
    const geometry *g = &l->g;
    if (l->dweight)
        tritonbnn_weight_grad(l->grad, FLOAT32, l->signs, l->dweight, l->weight, g, &l->strides,
                              threads);
    if (!l->dx) return;
    tritonbnn_input_grad(l->grad, l->packed, l->alpha, l->dx, g, threads);
    int64_t count = pixels_of(l) * g->channels;
    int passes = l->may_be_binary && is_binary(l->x, count);
    if (passes && !l->shift) return;
    Input input = {
        .images = g->images,
        .height = g->height,
        .width = g->width,
        .channels = g->channels,
        .x = {l->x, FLOAT32},
        .dsigns = {l->dx, FLOAT32},
        .du = {0, FLOAT32},
        .shortcut = IDENTITY,
        .shift = l->shift,
    };
    /* for the shift alone, where x's own gradient stays as it is */
    float *sloped = passes ? tritonbnn_workspace(WORKSPACE_DSIGNS, count * sizeof *sloped) : l->dx;
    pass_input(&input, (Numbers){sloped, FLOAT32}, l->dshift, threads);
}
