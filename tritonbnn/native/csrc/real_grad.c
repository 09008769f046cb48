/* The gradient of an ordinary convolution to its weight, its sums in a fixed order.

   It is for a network's first layer, which has few channels: torch's own result depends on the
   number of threads, and every sign behind it may then too. Lanes are 16 output channels. */
#include "vector.h"

#include "geometry.h"
#include "workspace.h"

#define MOST 9    /* numbers of an input whose sums stay in registers: 3 taps of 3 channels */
#define PARTS 256 /* of all rows, at most, whose sums are joined in double */

/* Some outputs side by side, each with the numbers of the input that one row of the kernel meets. */
typedef struct {
    const float *input, *grad; /* of the first output */
    int64_t step, outputs;     /* from one output to the next, in input and in grad */
    int64_t pixels, lanes;
} run;

/* sums[j stride] += the sum over a run of input number j times grad, for some numbers. */
INLINE void add_numbers(const run *r, int64_t first, int count, vec *sums, int64_t stride) {
    vec totals[MOST];
    for (int j = 0; j < count; j++) totals[j] = sums[(first + j) * stride];
    for (int64_t i = 0; i < r->pixels; i++) {
        vec grad = load_floats(r->grad + i * r->outputs, r->lanes);
        const float *input = r->input + i * r->step + first;
        for (int j = 0; j < count; j++) totals[j] += input[j] * grad;
    }
    for (int j = 0; j < count; j++) sums[(first + j) * stride] = totals[j];
}

/* The same for numbers first to last; the compiler keeps a constant count of sums in registers. */
static void add_run(const run *r, int64_t first, int64_t last, vec *sums, int64_t stride) {
    for (; first + MOST <= last; first += MOST) add_numbers(r, first, MOST, sums, stride);
    for (; first + 3 <= last; first += 3) add_numbers(r, first, 3, sums, stride);
    for (; first < last; first++) add_numbers(r, first, 1, sums, stride);
}

/* The outputs of a row, 16 output channels, and one row of the kernel. Its numbers lie side by
   side in the input, tap by tap: at the edges some of them fall on padding, and add nothing. */
static void add_kernel_row(const geometry *g, const float *input, const float *grad, int64_t lanes,
                           vec *sums, int64_t stride) {
    int64_t channels = g->channels, numbers = g->kernel_size * channels;
    int64_t inside = larger(0, g->width + g->padding - g->kernel_size + 1); /* of first columns */
    int64_t first = smaller(g->out_width, ceil_div(g->padding, g->stride));
    int64_t last = larger(first, smaller(g->out_width, ceil_div(inside, g->stride)));
    run r = {0, 0, g->stride * channels, g->out_channels, 1, lanes};
    for (int64_t i = 0; i < g->out_width; i += r.pixels) {
        int64_t column = i * g->stride - g->padding;
        r.input = input + column * channels;
        r.grad = grad + i * g->out_channels;
        r.pixels = i == first && last > first ? last - first : 1;
        int64_t before = larger(0, -column), after = smaller(g->kernel_size, g->width - column);
        if (r.pixels > 1)
            add_run(&r, 0, numbers, sums, stride);
        else
            add_run(&r, before * channels, after * channels, sums, stride);
    }
}

/* Add one row of outputs: sums[tap][channel][block of 16 outputs]. */
static void add_row(const geometry *g, const float *x, const float *grad, int64_t row, vec *sums) {
    int64_t blocks = ceil_div(g->out_channels, LANES);
    int64_t image = row / g->out_height, y = row % g->out_height * g->stride - g->padding;
    for (int64_t ty = 0; ty < g->kernel_size; ty++) {
        if (y + ty < 0 || y + ty >= g->height) continue;
        const float *input = x + (image * g->height + y + ty) * g->width * g->channels;
        for (int64_t b = 0; b < blocks; b++)
            add_kernel_row(g, input, grad + row * g->out_width * g->out_channels + b * LANES,
                           g->out_channels - b * LANES,
                           sums + ty * g->kernel_size * g->channels * blocks + b, blocks);
    }
}

/* x: (images, height, width, channels). grad: (images, out_height, out_width, out_channels).
   result: (out_channels, k, k, channels) in memory. */
EXPORT void tritonbnn_real_weight_grad(const float *x, const float *grad, float *result,
                                       const geometry *g, int64_t threads) {
    int64_t rows = g->images * g->out_height, blocks = ceil_div(g->out_channels, LANES);
    int64_t inputs = g->kernel_size * g->kernel_size * g->channels, count = inputs * blocks;
    int64_t part_rows = larger(1, ceil_div(rows, PARTS)), parts = ceil_div(rows, part_rows);
    vec *sums = tritonbnn_workspace(WORKSPACE_SHARED, parts * count * sizeof(vec));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < parts; part++) {
        memset(sums + part * count, 0, count * sizeof(vec));
        for (int64_t row = part * part_rows; row < smaller(rows, (part + 1) * part_rows); row++)
            add_row(g, x, grad, row, sums + part * count);
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i++) {
        int64_t lanes = smaller(LANES, g->out_channels - i % blocks * LANES);
        for (int64_t lane = 0; lane < lanes; lane++) {
            double total = 0; /* of all parts, in their order */
            for (int64_t part = 0; part < parts; part++) total += sums[part * count + i][lane];
            result[(i % blocks * LANES + lane) * inputs + i / blocks] = (float)total;
        }
    }
}
