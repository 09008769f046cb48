/* The gradient of a binary convolution to its +-1 input, by table.

   dx[pixel, c] = sum over taps and output channels o of
   alpha[o] grad[pixel - tap, o] sign[o, c, tap].
   Lanes are pixels of 16 strips. A strip is some rows of an image, over its whole width; a lane
   walks through its own. So a tap is another position in all lanes alike, and never another lane.
   Thirty output channels of a position make the tables, which serve all taps and channels. Rows
   next to a strip are read as well: their taps reach into it. */
#include "vector.h"

#include "bits.h"
#include "geometry.h"
#include "table.h"
#include "transpose.h"
#include "workspace.h"

#define LEAST_CHANNELS 16 /* of a job */
#define SUMS_BYTES (4 << 20)

typedef struct {
    const geometry *g;
    const float *grad;
    const float *alpha;
    const uint32_t *index; /* [tap][word of output channels][channel] */
    float *result;
    int64_t rows;     /* of a strip, in the input; a multiple of the stride */
    int64_t strips;   /* of all images */
    int64_t channels; /* of a job */
} problem;

/* A lane's strip: its image, or none, and its first input row. */
typedef struct {
    int64_t image, row;
} strip;

INLINE strip strip_at(const problem *p, int64_t i) {
    int64_t of_image = ceil_div(p->g->height, p->rows);
    return i < p->strips ? (strip){i / of_image, i % of_image * p->rows} : (strip){-1, 0};
}

/* The rows of grad, relative to a strip's first, whose taps reach into the strip. */
INLINE int64_t first_grad_row(const problem *p) {
    return -((p->g->kernel_size - 1 - p->g->padding) / p->g->stride);
}

INLINE int64_t last_grad_row(const problem *p) {
    return (p->rows - 1 + p->g->padding) / p->g->stride;
}

/* A row of grad by lanes: [column][output channel], times alpha; 0 outside of an image. */
static void load_row(const problem *p, const strip strips[LANES], int64_t row, vec *numbers) {
    const geometry *g = p->g;
    int64_t size = g->out_width * g->out_channels, outputs = g->out_channels;
    const float *rows[LANES];
    for (int lane = 0; lane < LANES; lane++) {
        int64_t y = strips[lane].row / g->stride + row;
        int used = strips[lane].image >= 0 && y >= 0 && y < g->out_height;
        rows[lane] = used ? p->grad + (strips[lane].image * g->out_height + y) * size : 0;
    }
    rows_to_lanes(rows, size, numbers);
    int32_t used[LANES] __attribute__((aligned(64)));
    for (int lane = 0; lane < LANES; lane++) used[lane] = rows[lane] ? -1 : 0;
    for (int64_t x = 0; x < g->out_width; x++)
        for (int64_t o = 0; o < outputs; o++, numbers++) /* 0 stays 0 where alpha is infinite */
            EACH(r, PARTS) {
                part *number = (part *)numbers + r;
                *number = (part)(((const part_bits *)used)[r] & (part_bits)(*number * p->alpha[o]));
            }
}

/* Add what one row of grad sends to the strip: sums[row][column][channel]. */
static void add_row(const problem *p, const vec *numbers, int64_t row, int64_t channel,
                    int64_t channels, vec *sums) {
    const geometry *g = p->g;
    int64_t k = g->kernel_size, words = table_words(g->out_channels);
    tables t;
    vec copy[WORD];
    for (int64_t word = 0; word < words; word++) {
        int64_t size = word_size(g->out_channels, word);
        for (int64_t x = 0; x < g->out_width; x++) {
            memcpy(copy, numbers + x * g->out_channels + word * WORD, size * sizeof(vec));
            make_tables(&t, copy, size);
            for (int64_t tap = 0; tap < k * k; tap++) {
                int64_t to_row = row * g->stride + tap / k - g->padding;
                int64_t to_column = x * g->stride + tap % k - g->padding;
                if (to_row < 0 || to_row >= p->rows || to_column < 0 || to_column >= g->width)
                    continue;
                const uint32_t *signs = p->index + (tap * words + word) * g->channels + channel;
                add_products(&t, groups_of(size), signs, 1,
                             sums + (to_row * g->width + to_column) * channels, channels);
            }
        }
    }
}

/* Write the sums, [row][column][channel] by lanes, where each lane's pixels are. */
static void write_strips(const problem *p, const strip strips[LANES], int64_t channel,
                         int64_t channels, const vec *sums) {
    const geometry *g = p->g;
    for (int64_t pixel = 0; pixel < p->rows * g->width; pixel++, sums += channels) {
        float *pixels[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            int64_t row = strips[lane].row + pixel / g->width;
            int64_t at = (strips[lane].image * g->height + row) * g->width + pixel % g->width;
            int used = strips[lane].image >= 0 && row < g->height;
            pixels[lane] = used ? p->result + at * g->channels + channel : 0;
        }
        lanes_to_rows(sums, channels, pixels);
    }
}

static void strips_grad(const problem *p, int64_t first, int64_t channel) {
    const geometry *g = p->g;
    int64_t channels = smaller(p->channels, g->channels - channel);
    int64_t count = p->rows * g->width * channels, row_size = g->out_width * g->out_channels;
    vec *sums = tritonbnn_workspace(WORKSPACE_OWN, (count + row_size) * sizeof(vec));
    strip strips[LANES];
    for (int lane = 0; lane < LANES; lane++) strips[lane] = strip_at(p, first + lane);
    memset(sums, 0, count * sizeof(vec));
    for (int64_t row = first_grad_row(p); row <= last_grad_row(p); row++) {
        load_row(p, strips, row, sums + count);
        add_row(p, sums + count, row, channel, channels, sums);
    }
    write_strips(p, strips, channel, channels, sums);
}

/* The weight's signs by output channel: bit i of index[tap][word][channel] is that of 30 word + i.
   Sixteen jobs, one a lane: a job is a tap, the 30 output channels of a word, and 32 channels. */
static void index_jobs(const geometry *g, const uint32_t *weight, uint32_t *index, int64_t first,
                       int64_t count) {
    int64_t taps = g->kernel_size * g->kernel_size, packed = words_of(g->channels);
    int64_t words = table_words(g->out_channels);
    uvec rows[32] = {{0}};
    for (int64_t lane = 0; lane < count; lane++) {
        int64_t job = first + lane, part = job % packed, word = job / packed % words;
        int64_t tap = job / packed / words, size = word_size(g->out_channels, word);
        const uint32_t *from = weight + (word * WORD * taps + tap) * packed + part;
        for (int64_t i = 0; i < size; i++) rows[i][lane] = from[i * taps * packed];
    }
    transpose_bits(rows);
    for (int64_t lane = 0; lane < count; lane++) {
        int64_t job = first + lane, channel = job % packed * SIGNS_OF_WORD;
        uint32_t *to = index + job / packed * g->channels + channel;
        int64_t size = smaller(SIGNS_OF_WORD, g->channels - channel);
        for (int64_t c = 0; c < size; c++) to[c] = rows[c][lane];
    }
}

static uint32_t *make_index(const geometry *g, const uint32_t *weight, int threads) {
    int64_t rows = g->kernel_size * g->kernel_size * table_words(g->out_channels);
    int64_t jobs = rows * words_of(g->channels);
    uint32_t *index = tritonbnn_workspace(WORKSPACE_SHARED, rows * g->channels * sizeof *index);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < jobs; first += LANES)
        index_jobs(g, weight, index, first, smaller(LANES, jobs - first));
    return index;
}

/* The work of a strip's job in instructions, roughly: to use tables, and to make them. */
static double work(const geometry *g, int64_t rows, int64_t channels) {
    double grad_rows = rows / (double)g->stride;
    double made = grad_rows + (g->kernel_size - 1) / (double)g->stride;
    return grad_rows * 4 * g->kernel_size * g->kernel_size / g->stride * channels + made * 700;
}

/* Choose the rows of a strip and the channels of a job, so that few lanes stay unused, few tables
   are made twice, and all threads have work. It changes no sum: a lane's pixel gets the same terms
   in the same order in strips of any size. */
static void choose_jobs(problem *p, int64_t threads) {
    const geometry *g = p->g;
    double least = -1;
    for (int64_t channels = g->channels;; channels = ceil_div(channels, 2)) {
        for (int64_t rows = g->stride; rows < g->height + g->stride; rows += g->stride) {
            int64_t bytes = rows * g->width * channels * (int64_t)sizeof(vec);
            if (bytes > SUMS_BYTES && rows > g->stride) break;
            int64_t strips = g->images * ceil_div(g->height, rows);
            int64_t jobs = ceil_div(strips, LANES) * ceil_div(g->channels, channels);
            double time = ceil_div(jobs, threads) * work(g, rows, channels);
            if (least >= 0 && time >= least) continue;
            least = time;
            p->rows = rows, p->strips = strips, p->channels = channels;
        }
        if (channels <= LEAST_CHANNELS) return;
    }
}

/* grad: (images, out_height, out_width, out_channels); alpha: (out_channels,).
   weight: packed signs, (out_channels, k, k, words). result: (images, height, width, channels). */
EXPORT void tritonbnn_input_grad(const float *grad, const uint32_t *weight, const float *alpha,
                                 float *result, const geometry *g, int64_t threads) {
    problem p = {.g = g, .grad = grad, .alpha = alpha, .result = result};
    p.index = make_index(g, weight, threads);
    choose_jobs(&p, threads);
    int64_t groups = ceil_div(p.strips, LANES), parts = ceil_div(g->channels, p.channels);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t job = 0; job < groups * parts; job++)
        strips_grad(&p, job / parts * LANES, job % parts * p.channels);
}
