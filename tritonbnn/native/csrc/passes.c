/* The passes between a unit's convolution and its output, forward and backward. */
#include <stdlib.h>

#include "tiles.h"

/* The shortcut as floats of z's shape: the channels twice. */
INLINE void repeat_channels(Numbers stream, Type type, const Tile *tile, float *skip) {
    int64_t half = tile->channels / 2, first = tile->pixel * half;
    for (int64_t p = 0; p < tile->pixels; p++, first += half, skip += 2 * half)
        #pragma omp simd
        for (int64_t c = 0; c < half; c++)
            skip[c] = skip[half + c] = number(stream.data, type, first + c);
}

/* Or the means of 2 x 2 pixels. Pixels run on from row to row, so one division finds the first. */
INLINE void pool_pixels(const Unit *unit, Type type, const Tile *tile, float *skip) {
    int64_t channels = tile->channels, below = 2 * unit->width * channels;
    int64_t row = tile->pixel / unit->width, x = tile->pixel % unit->width;
    for (int64_t p = 0; p < tile->pixels; p++, skip += channels) {
        int64_t corner = 2 * (row * below + x * channels);
        #pragma omp simd
        for (int64_t c = 0; c < channels; c++) {
            float sum = number(unit->stream.data, type, corner + c);
            sum += number(unit->stream.data, type, corner + channels + c);
            sum += number(unit->stream.data, type, corner + below + c);
            sum += number(unit->stream.data, type, corner + below + channels + c);
            skip[c] = sum * 0.25f;
        }
        if (++x == unit->width) {
            x = 0;
            row++;
        }
    }
}

static const float *read_shortcut(const Unit *unit, const Tile *tile, float *scratch) {
    int rounded = unit->stream.type == BFLOAT16;
    if (unit->shortcut == IDENTITY)
        return read_floats(unit->stream, tile, scratch);
    if (unit->shortcut == NO_SHORTCUT)
        memset(scratch, 0, tile->floats * sizeof(float));
    else if (unit->shortcut == REPEAT && rounded)
        repeat_channels(unit->stream, BFLOAT16, tile, scratch);
    else if (unit->shortcut == REPEAT)
        repeat_channels(unit->stream, FLOAT32, tile, scratch);
    else if (rounded)
        pool_pixels(unit, BFLOAT16, tile, scratch);
    else
        pool_pixels(unit, FLOAT32, tile, scratch);
    return scratch;
}

static int64_t pixels_of(const Unit *unit) { return unit->images * unit->height * unit->width; }

/* The vectors that t and its slope are made of, in memory of their own. */
typedef struct {
    float *scale, *constant, *slope;
} Affine;

/* t = a * scale + constant + shortcut. What varies by channel alone is rounded once. */
static Affine affine_of(const Unit *unit) {
    Affine affine;
    affine.scale = allocate(3 * unit->channels * (int64_t)sizeof(float));
    affine.constant = affine.scale + unit->channels;
    affine.slope = affine.constant + unit->channels;
    for (int64_t c = 0; c < unit->channels; c++) {
        affine.scale[c] = unit->scale ? unit->scale[c] : 1;
        double constant = unit->offset ? unit->offset[c] : 0;
        if (unit->mean)
            constant -= (double)unit->mean[c] * affine.scale[c];
        if (unit->shift_mid)
            constant += unit->shift_mid[c];
        affine.constant[c] = (float)constant;
        affine.slope[c] = unit->slope ? unit->slope[c] : 1;
    }
    return affine;
}

typedef struct {
    const Unit *unit;
    Numbers z;
    uint32_t *signs;
} Forward;

static void forward_tile(const void *pass, const Tile *tile) {
    const Forward *forward = pass;
    const Unit *unit = forward->unit;
    const float *scale = tile->vectors[0], *constant = tile->vectors[1];
    const float *slope = tile->vectors[2], *shift_out = tile->vectors[3];
    const float *a = read_floats(unit->a, tile, tile->scratch[0]);
    const float *skip = read_shortcut(unit, tile, tile->scratch[1]);
    float *z = floats_for(forward->z, tile, tile->scratch[2]);
    for (int64_t at = 0; at < tile->floats; at += tile->period) {
        int64_t count = smaller(tile->period, tile->floats - at);
        #pragma omp simd
        for (int64_t i = 0; i < count; i++) {
            float t = a[at + i] * scale[i] + constant[i] + skip[at + i];
            float below = t * slope[i]; /* computed in any case: no branch, all lanes at once */
            z[at + i] = (t > 0 ? t : below) + shift_out[i];
        }
    }
    write_floats(forward->z, tile, z);
    if (forward->signs) /* while z is in the caches */
        pack_tile(forward->z, tile->vectors[4], forward->signs, tile, tile->scratch[0]);
}

void pass_forward(const Unit *unit, Numbers z, uint32_t *signs, const float *next_shift,
                  int64_t threads) {
    Affine affine = affine_of(unit);
    Forward forward = {unit, z, signs};
    Pass pass = {
        .tile = forward_tile,
        .pass = &forward,
        .pixels = pixels_of(unit),
        .channels = unit->channels,
        .vectors = {affine.scale, affine.constant, affine.slope, unit->shift_out, next_shift},
    };
    run_pass(&pass, NULL, threads);
    free(affine.scale);
}

/* What the rows of a tile read, and where they write: floats from a period's start on. */
typedef struct {
    const float *grad, *a, *skip, *scale, *constant, *slope;
    float *du;
} Activation;

typedef struct {
    float du;      /* grad * (t > 0 ? 1 : slope) */
    float through; /* grad * min(t, 0) */
} Slopes;

/* In arithmetic, so that a NaN in t or an infinite gradient goes where eager torch has it. */
INLINE Slopes slopes_at(const Activation *x, int activated, int64_t at, int64_t i) {
    float grad = x->grad[at];
    if (!activated)
        return (Slopes){grad, 0};
    float t = x->a[at] * x->scale[i] + x->constant[i] + x->skip[at];
    float positive = t <= 0 ? 0 : grad;
    float negative = grad - positive;
    return (Slopes){positive + negative * x->slope[i], t * negative};
}

/* The floats that a pass of backward reads, as far as it needs them. */
static Activation read_activation(const Unit *unit, Numbers grad, const Tile *tile) {
    return (Activation){
        .grad = read_floats(grad, tile, tile->scratch[0]),
        .a = read_floats(unit->a, tile, tile->scratch[1]),
        .skip = unit->slope ? read_shortcut(unit, tile, tile->scratch[2]) : NULL,
        .scale = tile->vectors[0],
        .constant = tile->vectors[1],
        .slope = tile->vectors[2],
    };
}

typedef struct {
    const Unit *unit;
    Numbers grad, du;
} Sums;

/* Some rows, a period apart: their terms are added before a sum is stored. */
INLINE void add_rows(const Activation *x, const Tile *tile, int rows, int activated, int64_t start,
                     int64_t count) {
    const float *mean = tile->vectors[3];
    float *du_sum = tile->sums, *du_a_sum = du_sum + tile->period;
    float *through_sum = du_a_sum + tile->period, *grad_sum = through_sum + tile->period;
    #pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        #pragma GCC unroll 4
        for (int row = 0; row < rows; row++) {
            int64_t at = start + row * tile->period + i;
            Slopes slopes = slopes_at(x, activated, at, i);
            x->du[at] = slopes.du;
            s0 += slopes.du;
            s1 += slopes.du * (x->a[at] - mean[i]);
            s2 += slopes.through;
            s3 += x->grad[at];
        }
        du_sum[i] += s0;
        du_a_sum[i] += s1;
        through_sum[i] += s2;
        grad_sum[i] += s3;
    }
}

INLINE void add_tile(const Activation *x, const Tile *tile, int activated) {
    int64_t at = 0, period = tile->period;
    for (; at + ROWS * period <= tile->floats; at += ROWS * period)
        add_rows(x, tile, ROWS, activated, at, period);
    for (; at < tile->floats; at += period)
        add_rows(x, tile, 1, activated, at, smaller(period, tile->floats - at));
}

static void sums_tile(const void *pass, const Tile *tile) {
    const Sums *sums = pass;
    Activation x = read_activation(sums->unit, sums->grad, tile);
    x.du = floats_for(sums->du, tile, tile->scratch[3]);
    if (sums->unit->slope)
        add_tile(&x, tile, 1);
    else
        add_tile(&x, tile, 0);
    write_floats(sums->du, tile, x.du);
}

void pass_sums(const Unit *unit, Numbers grad, Numbers du, float *sums, int64_t threads) {
    Affine affine = affine_of(unit);
    Sums activation = {unit, grad, du};
    Pass pass = {
        .tile = sums_tile,
        .pass = &activation,
        .pixels = pixels_of(unit),
        .channels = unit->channels,
        .vectors = {affine.scale, affine.constant, affine.slope, unit->mean},
        .sums = 4,
    };
    double *totals = allocate(4 * unit->channels * (int64_t)sizeof(double));
    run_pass(&pass, totals, threads);
    for (int64_t i = 0; i < 4 * unit->channels; i++)
        sums[i] = (float)totals[i];
    free(totals);
    free(affine.scale);
}

typedef struct {
    const Unit *unit;
    Numbers grad, dy, du;
} Apply;

INLINE void apply_rows(const Activation *x, const Tile *tile, float *dy, int activated) {
    const float *du_scale = tile->vectors[3], *a_scale = tile->vectors[4];
    const float *constant = tile->vectors[5];
    for (int64_t start = 0; start < tile->floats; start += tile->period) {
        int64_t count = smaller(tile->period, tile->floats - start);
        #pragma omp simd
        for (int64_t i = 0; i < count; i++) {
            int64_t at = start + i;
            float du = slopes_at(x, activated, at, i).du;
            x->du[at] = du;
            dy[at] = du * du_scale[i] + (x->a[at] * a_scale[i] + constant[i]);
        }
    }
}

static void apply_tile(const void *pass, const Tile *tile) {
    const Apply *apply = pass;
    Activation x = read_activation(apply->unit, apply->grad, tile);
    x.du = floats_for(apply->du, tile, tile->scratch[3]);
    float *dy = floats_for(apply->dy, tile, tile->scratch[4]);
    if (apply->unit->slope)
        apply_rows(&x, tile, dy, 1);
    else
        apply_rows(&x, tile, dy, 0);
    write_floats(apply->du, tile, x.du);
    write_floats(apply->dy, tile, dy);
}

void pass_apply(const Unit *unit, Numbers grad, const float *du_scale, const float *a_scale,
                const float *constant, Numbers dy, Numbers du, int64_t threads) {
    Affine affine = affine_of(unit);
    Apply apply = {unit, grad, dy, du};
    Pass pass = {
        .tile = apply_tile,
        .pass = &apply,
        .pixels = pixels_of(unit),
        .channels = unit->channels,
        .vectors = {affine.scale, affine.constant, affine.slope, du_scale, a_scale, constant},
    };
    run_pass(&pass, NULL, threads);
    free(affine.scale);
}
