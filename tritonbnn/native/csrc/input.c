/* Backward through the sign, and back along the shortcut. */
#include <stdlib.h>

#include "tiles.h"

/* A tile of x gets, pixel by pixel, what z's gradient sends back along the shortcut. */
INLINE void repeat_back(Numbers du, Type type, const Tile *tile, float *skip) {
    int64_t channels = tile->channels, first = 2 * tile->pixel * channels;
    for (int64_t p = 0; p < tile->pixels; p++, first += 2 * channels, skip += channels)
        #pragma omp simd
        for (int64_t c = 0; c < channels; c++)
            skip[c] = number(du.data, type, first + c)
                    + number(du.data, type, first + channels + c);
}

INLINE void pool_back(const Input *input, Type type, const Tile *tile, float *skip) {
    int64_t channels = tile->channels, width = input->width, half = width / 2;
    int64_t row = tile->pixel / width, x = tile->pixel % width;
    for (int64_t p = 0; p < tile->pixels; p++, skip += channels) {
        int64_t first = (row / 2 * half + x / 2) * channels; /* image heights are even */
        #pragma omp simd
        for (int64_t c = 0; c < channels; c++)
            skip[c] = number(input->du.data, type, first + c) * 0.25f;
        if (++x == width) {
            x = 0;
            row++;
        }
    }
}

static const float *read_shortcut_grad(const Input *input, const Tile *tile, float *scratch) {
    int rounded = input->du.type == BFLOAT16;
    if (!input->du.data)
        memset(scratch, 0, tile->floats * sizeof(float));
    else if (input->shortcut == IDENTITY)
        return read_floats(input->du, tile, scratch);
    else if (input->shortcut == REPEAT && rounded)
        repeat_back(input->du, BFLOAT16, tile, scratch);
    else if (input->shortcut == REPEAT)
        repeat_back(input->du, FLOAT32, tile, scratch);
    else if (rounded)
        pool_back(input, BFLOAT16, tile, scratch);
    else
        pool_back(input, FLOAT32, tile, scratch);
    return scratch;
}

typedef struct {
    const Input *input;
    Numbers dx;
} Signs;

typedef struct {
    const float *x, *dsigns, *skip;
    float *dx;
} Slope;

INLINE void input_rows(const Slope *s, const Tile *tile, int rows, int64_t start, int64_t count) {
    const float *shift = tile->vectors[0];
    #pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        float sum = 0;
        #pragma GCC unroll 4
        for (int row = 0; row < rows; row++) {
            int64_t at = start + row * tile->period + i;
            float slope = 2 - 2 * __builtin_fabsf(s->x[at] + shift[i]);
            float ds = (slope < 0 ? 0 : slope) * s->dsigns[at]; /* a NaN stays one */
            sum += ds;
            s->dx[at] = ds + s->skip[at];
        }
        tile->sums[i] += sum;
    }
}

static void input_tile(const void *pass, const Tile *tile) {
    const Signs *signs = pass;
    Slope slope = {
        .x = read_floats(signs->input->x, tile, tile->scratch[0]),
        .dsigns = read_floats(signs->input->dsigns, tile, tile->scratch[1]),
        .skip = read_shortcut_grad(signs->input, tile, tile->scratch[2]),
        .dx = floats_for(signs->dx, tile, tile->scratch[3]),
    };
    int64_t at = 0, period = tile->period;
    for (; at + ROWS * period <= tile->floats; at += ROWS * period)
        input_rows(&slope, tile, ROWS, at, period);
    for (; at < tile->floats; at += period)
        input_rows(&slope, tile, 1, at, smaller(period, tile->floats - at));
    write_floats(signs->dx, tile, slope.dx);
}

void pass_input(const Input *input, Numbers dx, float *dshift, int64_t threads) {
    Signs signs = {input, dx};
    Pass pass = {
        .tile = input_tile,
        .pass = &signs,
        .pixels = input->images * input->height * input->width,
        .channels = input->channels,
        .vectors = {input->shift},
        .sums = 1,
    };
    double *totals = allocate(input->channels * (int64_t)sizeof(double));
    run_pass(&pass, totals, threads);
    for (int64_t c = 0; c < input->channels; c++)
        dshift[c] = (float)totals[c];
    free(totals);
}
