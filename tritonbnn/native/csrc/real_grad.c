/* The gradient of an ordinary convolution to its weight, its sums in a fixed order.

   It is for a network's first layer, which has few channels: torch's own result depends on the
   number of threads, and every sign behind it may then too. Lanes are 16 output channels. */
#include "vector.h"

#include "geometry.h"
#include "workspace.h"

#define PARTS 256 /* of all rows, at most, whose sums are joined in double */

/* Add one row of outputs: sums[tap][channel][block of 16 outputs]. */
static void add_row(const geometry *g, const float *x, const float *grad, int64_t row, vec *sums) {
    int64_t k = g->kernel_size, blocks = ceil_div(g->out_channels, LANES);
    int64_t image = row / g->out_height, y = row % g->out_height * g->stride - g->padding;
    for (int64_t i = 0; i < g->out_width; i++) {
        const float *from = grad + (row * g->out_width + i) * g->out_channels;
        for (int64_t tap = 0; tap < k * k; tap++) {
            int64_t at_y = y + tap / k, at_x = i * g->stride - g->padding + tap % k;
            if (at_y < 0 || at_y >= g->height || at_x < 0 || at_x >= g->width) continue;
            const float *pixel = x + ((image * g->height + at_y) * g->width + at_x) * g->channels;
            vec *to = sums + tap * g->channels * blocks;
            for (int64_t c = 0; c < g->channels; c++)
                for (int64_t b = 0; b < blocks; b++, to++)
                    *to += pixel[c] * load_some(from, FLOAT32, b * LANES,
                                                g->out_channels - b * LANES);
        }
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
