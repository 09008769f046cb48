/* The convolution of signs with a real weight, by table.

   y[pixel, o] = sum over taps and channels of weight[o, c, tap] sign[pixel + tap, c]. Lanes are 16
   output channels. Thirty input channels of a tap make the tables, which serve all pixels of a
   tile. A tap that falls on padding is left out: it adds nothing. */
#include "vector.h"

#include "geometry.h"
#include "table.h"
#include "transpose.h"
#include "workspace.h"

#define TILE 4096 /* output pixels of a job: their sums should stay in the second cache */

typedef struct {
    const geometry *g;
    const uint32_t *index; /* [word][input pixel] */
    const vec *weight;     /* [block of 16 outputs][tap][channel] */
    void *result;
    int64_t type, tile_rows;
} problem;

/* The signs in words of 30: bit i of index[word][pixel] is that of channel 30 word + i. */
static void make_index(const geometry *g, const uint32_t *signs, uint32_t *index, int threads) {
    int64_t pixels = g->images * g->height * g->width, packed = words_of(g->channels);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t pixel = 0; pixel < pixels; pixel++)
        for (int64_t word = 0; word < table_words(g->channels); word++) {
            int64_t bit = word * WORD, at = bit / SIGNS_OF_WORD;
            const uint32_t *from = signs + pixel * packed + at;
            uint64_t both = from[0] | (at + 1 < packed ? (uint64_t)from[1] << 32 : 0);
            index[word * pixels + pixel] = both >> bit % SIGNS_OF_WORD & ((1u << WORD) - 1);
        }
}

/* The weight by lanes of output channels: 0 in lanes past the last. */
static void arrange_block(const geometry *g, const float *weight, int64_t block, int64_t type,
                          vec *arranged) {
    int64_t size = g->kernel_size * g->kernel_size * g->channels;
    const float *rows[LANES];
    for (int64_t lane = 0; lane < LANES; lane++) {
        int64_t o = block * LANES + lane;
        rows[lane] = o < g->out_channels ? weight + o * size : 0;
    }
    rows_to_lanes(rows, size, arranged);
    if (type != BFLOAT16) return;
    for (int64_t i = 0; i < size; i++) {
        bfloat16 halves[LANES];
        store_bfloat16(halves, arranged[i]);
        arranged[i] = load_bfloat16(halves);
    }
}

/* Add one tap and one word of channels to a tile's sums. */
static void add_tap(const problem *p, const tables *t, int64_t groups, int64_t tap, int64_t word,
                    int64_t first_row, int64_t rows, vec *sums) {
    const geometry *g = p->g;
    int64_t ty = tap / g->kernel_size - g->padding, tx = tap % g->kernel_size - g->padding;
    const uint32_t *index = p->index + word * g->images * g->height * g->width;
    int64_t first = larger(0, ceil_div(larger(0, -tx), g->stride));
    int64_t last = smaller(g->out_width, ceil_div(larger(0, g->width - tx), g->stride));
    for (int64_t row = first_row; row < first_row + rows; row++) {
        int64_t image = row / g->out_height, y = row % g->out_height * g->stride + ty;
        if (y < 0 || y >= g->height || first >= last) continue;
        const uint32_t *signs = index + (image * g->height + y) * g->width + tx;
        add_products(t, groups, signs + first * g->stride, g->stride,
                     sums + (row - first_row) * g->out_width + first, last - first);
    }
}

static void convolve_tile(const problem *p, int64_t block, int64_t first_row) {
    const geometry *g = p->g;
    int64_t taps = g->kernel_size * g->kernel_size;
    int64_t rows = smaller(p->tile_rows, g->images * g->out_height - first_row);
    int64_t pixels = rows * g->out_width, lanes = smaller(LANES, g->out_channels - block * LANES);
    vec *sums = tritonbnn_workspace(WORKSPACE_OWN, pixels * sizeof(vec)), numbers[WORD];
    tables t;
    memset(sums, 0, pixels * sizeof(vec));
    for (int64_t tap = 0; tap < taps; tap++)
        for (int64_t word = 0; word < table_words(g->channels); word++) {
            int64_t size = word_size(g->channels, word);
            const vec *from = p->weight + (block * taps + tap) * g->channels + word * WORD;
            memcpy(numbers, from, size * sizeof(vec));
            make_tables(&t, numbers, size);
            add_tap(p, &t, groups_of(size), tap, word, first_row, rows, sums);
        }
    for (int64_t i = 0; i < pixels; i++) {
        int64_t at = (first_row * g->out_width + i) * g->out_channels + block * LANES;
        store_some(p->result, p->type, at, sums[i], lanes);
    }
}

/* signs: the packed input. weight: (out_channels, k, k, channels) in memory.
   result: (images, out_height, out_width, out_channels) of the type, to which the weight is
   rounded before the product. */
EXPORT void tritonbnn_conv_real(const uint32_t *signs, const float *weight, void *result,
                                int64_t type, const geometry *g, int64_t threads) {
    int64_t pixels = g->images * g->height * g->width, blocks = ceil_div(g->out_channels, LANES);
    int64_t size = g->kernel_size * g->kernel_size * g->channels;
    vec *arranged = tritonbnn_workspace(WORKSPACE_SHARED, blocks * size * sizeof(vec));
    uint32_t *index = tritonbnn_workspace(
        WORKSPACE_PADDED, table_words(g->channels) * pixels * sizeof(uint32_t));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < blocks; block++)
        arrange_block(g, weight, block, type, arranged + block * size);
    make_index(g, signs, index, threads);
    problem p = {g, index, arranged, result, type, larger(1, TILE / larger(1, g->out_width))};
    int64_t tiles = ceil_div(g->images * g->out_height, p.tile_rows);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t job = 0; job < blocks * tiles; job++)
        convolve_tile(&p, job % blocks, job / blocks * p.tile_rows);
}
