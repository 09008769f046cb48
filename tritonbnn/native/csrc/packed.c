/* The convolution of signs with signs: the number of equal bits less the number of different ones.

   Lanes are 16 output channels: a word of the input meets 16 words of the weight at once. Padding
   is words of 0, which count as -1. What that makes too much or too little depends only on which
   taps fall on padding, so it is known beforehand for each kind of row and column. */
#include "vector.h"

#if defined(__AVX512VPOPCNTDQ__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "bits.h"
#include "geometry.h"
#include "transpose.h"
#include "workspace.h"

/* The 16 lanes as one register or as several, whatever the machine has. Bits are counted in parts
   that are cheap to add, and a lane's parts are joined at the end: one part a lane where an
   instruction counts bits, else one a byte, which holds the counts of 31 words. */
#if defined(__AVX512VPOPCNTDQ__)
enum { REGISTERS = 1 };
#define PIXELS 8 /* outputs side by side whose counts stay in registers */
#define PARTS_HOLD INT64_MAX
#elif defined(__AVX2__)
enum { REGISTERS = 2 };
#define PIXELS 4
#define PARTS_HOLD 31
#else
enum { REGISTERS = 4 };
#define PIXELS 4
#define PARTS_HOLD 31
#endif

typedef uint32_t lanes __attribute__((vector_size(sizeof(uvec) / REGISTERS)));

INLINE lanes count_parts(lanes x) {
#if defined(__AVX512VPOPCNTDQ__)
    return (lanes)_mm512_popcnt_epi32((__m512i)x);
#elif defined(__AVX2__)
    const __m256i counts = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4)); /* of half a byte */
    __m256i low = (__m256i)(x & 0x0f0f0f0f), high = (__m256i)(x >> 4 & 0x0f0f0f0f);
    return (lanes)_mm256_add_epi8(_mm256_shuffle_epi8(counts, low),
                                  _mm256_shuffle_epi8(counts, high));
#else
    x = x - (x >> 1 & 0x55555555);
    x = (x & 0x33333333) + (x >> 2 & 0x33333333);
    return (x + (x >> 4)) & 0x0f0f0f0f;
#endif
}

INLINE lanes join_parts(lanes parts) {
#if defined(__AVX512VPOPCNTDQ__)
    return parts;
#else
    lanes pairs = (parts & 0x00ff00ff) + (parts >> 8 & 0x00ff00ff);
    return (pairs & 0xffff) + (pairs >> 16);
#endif
}

INLINE ivec count_bits(const uvec *x) {
    lanes registers[REGISTERS];
    memcpy(registers, x, sizeof registers);
    for (int r = 0; r < REGISTERS; r++) registers[r] = join_parts(count_parts(registers[r]));
    ivec counts;
    memcpy(&counts, registers, sizeof counts);
    return counts;
}

typedef struct {
    const geometry *g;
    sign_map map;
    const uvec *weight;      /* [block of 16 outputs][tap][word] */
    const ivec *whole;       /* [row kind][column kind][block]: the sum if no bit differed */
    const int64_t *row_kind; /* of each output row */
    const int64_t *column_kind;
    int64_t blocks, column_kinds;
    const float *alpha;
    void *result;
    int64_t type;
    double *sum, *square; /* (out_channels,), or NULL */
} problem;

/* Bits that differ between the weight and the input under it, for some pixels side by side. */
INLINE void differences(const problem *p, const uint32_t *input, int64_t block, int pixels,
                        ivec counts[PIXELS]) {
    const geometry *g = p->g;
    int64_t words = p->map.pixel, step = g->stride * words, row = g->kernel_size * words;
    const lanes *weight = (const lanes *)(p->weight + block * g->kernel_size * row);
    lanes totals[PIXELS][REGISTERS], parts[PIXELS][REGISTERS];
    EACH(i, pixels) EACH(r, REGISTERS) totals[i][r] = parts[i][r] = (lanes){0};
    for (int64_t ty = 0; ty < g->kernel_size; ty++, input += p->map.row)
        for (int64_t at = 0; at < row;) {
            int64_t last = row - at < PARTS_HOLD ? row : at + PARTS_HOLD;
            for (; at < last; at++, weight += REGISTERS)
                EACH(i, pixels)
                    EACH(r, REGISTERS)
                        parts[i][r] += count_parts(weight[r] ^ input[at + i * step]);
            if (PARTS_HOLD == INT64_MAX) continue;
            EACH(i, pixels) EACH(r, REGISTERS) {
                totals[i][r] += join_parts(parts[i][r]);
                parts[i][r] = (lanes){0};
            }
        }
    if (PARTS_HOLD == INT64_MAX) memcpy(totals, parts, sizeof totals);
    EACH(i, pixels) memcpy(counts + i, totals[i], sizeof *counts);
}

/* Store the sums of 16 output channels at some pixels, in the result's type, scaled if need be. */
INLINE void store_sums(const problem *p, int64_t pixel, int64_t block, int pixels,
                       const ivec *sums) {
    int64_t channels = p->g->out_channels, first = block * LANES;
    int64_t count = smaller(LANES, channels - first), at = pixel * channels + first;
    if (p->type == INT16) {
        EACH(i, pixels)
            store_shorts((int16_t *)p->result + at + i * channels,
                         __builtin_convertvector(sums[i], short_vec), count);
        return;
    }
    if (p->type == INT32) {
        EACH(i, pixels) /* copied as floats are: nothing computes with them */
            store_floats((float *)p->result + at + i * channels, (vec)sums[i], count);
        return;
    }
    vec alpha = p->alpha ? load_floats(p->alpha + first, count) : splat(1);
    if (p->type == FLOAT32 && count == LANES) { /* the most frequent, without a branch a pixel */
        EACH(i, pixels) {
            vec scaled = __builtin_convertvector(sums[i], vec) * alpha;
            memcpy((float *)p->result + at + i * channels, &scaled, sizeof scaled);
        }
        return;
    }
    EACH(i, pixels)
        store_some(p->result, p->type, at + i * channels,
                   __builtin_convertvector(sums[i], vec) * alpha, count);
}

typedef double half_vec __attribute__((vector_size(64)));

/* Sums of a row of outputs, exactly: whole numbers below 2^53. */
typedef struct {
    half_vec sum[2], square[2];
} moments;

INLINE void add_moments(moments *m, ivec sums) {
    typedef int32_t half_ivec __attribute__((vector_size(32)));
    half_ivec halves[2];
    memcpy(halves, &sums, sizeof sums);
    for (int i = 0; i < 2; i++) {
        half_vec x = __builtin_convertvector(halves[i], half_vec);
        m->sum[i] += x;
        m->square[i] += x * x;
    }
}

/* Where a row of outputs has its input and its sums. */
typedef struct {
    const uint32_t *input;
    const ivec *whole;
    int64_t first_pixel;
} place;

INLINE void row_piece(const problem *p, const place *at, int64_t block, int64_t x, int pixels,
                      moments *m) {
    ivec sums[PIXELS];
    differences(p, at->input + x * p->g->stride * p->map.pixel, block, pixels, sums);
    EACH(i, pixels)
        sums[i] = at->whole[p->column_kind[x + i] * p->blocks + block] - 2 * sums[i];
    if (p->result) store_sums(p, at->first_pixel + x, block, pixels, sums);
    if (p->sum) EACH(i, pixels) add_moments(m, sums[i]);
}

static void convolve_row(const problem *p, int64_t row, int64_t block, double *sum,
                         double *square) {
    const geometry *g = p->g;
    int64_t image = row / g->out_height, y = row % g->out_height, x = 0, width = g->out_width;
    place at = {p->map.words + image * p->map.image + y * g->stride * p->map.row,
                p->whole + p->row_kind[y] * p->column_kinds * p->blocks, row * width};
    moments m = {{{0}}, {{0}}};
#if PIXELS == 8
    if (width % 8 && width % 7 == 0) /* as maps of an image of 224 pixels have: nothing is left */
        for (; x < width; x += 7) row_piece(p, &at, block, x, 7, &m);
    for (; x + 8 <= width; x += 8) row_piece(p, &at, block, x, 8, &m);
#endif
    for (; x + 4 <= width; x += 4) row_piece(p, &at, block, x, 4, &m);
    for (; x + 2 <= width; x += 2) row_piece(p, &at, block, x, 2, &m);
    for (; x < width; x++) row_piece(p, &at, block, x, 1, &m);
    for (int64_t lane = 0; p->sum && lane < LANES; lane++) {
        sum[block * LANES + lane] += m.sum[lane / 8][lane % 8];
        square[block * LANES + lane] += m.square[lane / 8][lane % 8];
    }
}

/* The weight by lanes of output channels: (blocks, k, k, words) from (out_channels, k, k, words). */
static void arrange_weight(const geometry *g, const uint32_t *weight, int64_t blocks,
                           uvec *arranged, int64_t threads) {
    int64_t size = g->kernel_size * g->kernel_size * words_of(g->channels);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        const float *rows[LANES]; /* of any bits: nothing computes with them */
        for (int64_t lane = 0; lane < LANES; lane++) {
            int64_t o = block * LANES + lane;
            rows[lane] = o < g->out_channels ? (const float *)(weight + o * size) : 0;
        }
        rows_to_lanes(rows, size, (vec *)(arranged + block * size));
    }
}

/* Which taps of a kernel's side are inside the image, as a kind: rows or columns alike. Kinds are
   numbered in order of first use; first_of is an output of each kind. */
static int64_t find_kinds(const geometry *g, int64_t outputs, int64_t size, int64_t *kind,
                          int64_t *first_of) {
    int64_t kinds = 0;
    for (int64_t i = 0; i < outputs; i++) {
        int64_t start = i * g->stride - g->padding, found = 0;
        int64_t below = larger(0, -start), above = larger(0, start + g->kernel_size - size);
        for (; found < kinds; found++) {
            int64_t other = first_of[found] * g->stride - g->padding;
            if (larger(0, -other) == below && larger(0, other + g->kernel_size - size) == above)
                break;
        }
        if (found == kinds) first_of[kinds++] = i;
        kind[i] = found;
    }
    return kinds;
}

INLINE int is_inside(const geometry *g, int64_t output, int64_t tap, int64_t size) {
    int64_t at = output * g->stride - g->padding + tap;
    return at >= 0 && at < size;
}

/* The sum at an output if no bit differed: a tap inside adds its channels; one on padding adds the
   twice the weight's ones that its zeros will be found to differ in. */
static void find_whole(const problem *p, int64_t y, int64_t x, ivec *whole) {
    const geometry *g = p->g;
    int64_t words = p->map.pixel, taps = g->kernel_size * g->kernel_size;
    for (int64_t block = 0; block < p->blocks; block++) {
        ivec total = {0};
        for (int64_t tap = 0; tap < taps; tap++) {
            int inside = is_inside(g, y, tap / g->kernel_size, g->height) &&
                         is_inside(g, x, tap % g->kernel_size, g->width);
            if (inside) total += (int32_t)g->channels;
            for (int64_t i = 0; !inside && i < words; i++)
                total += 2 * count_bits(&p->weight[(block * taps + tap) * words + i]);
        }
        whole[block] = total;
    }
}

static void convolve(problem *p, int64_t threads) {
    const geometry *g = p->g;
    int64_t rows = g->images * g->out_height, sums = p->blocks * LANES;
    for (int64_t o = 0; p->sum && o < g->out_channels; o++) p->sum[o] = p->square[o] = 0;
#pragma omp parallel num_threads(threads)
    {
        double *sum = tritonbnn_workspace(WORKSPACE_OWN, 2 * sums * sizeof *sum);
        memset(sum, 0, 2 * sums * sizeof *sum);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++)
            for (int64_t block = 0; block < p->blocks; block++)
                convolve_row(p, row, block, sum, sum + sums);
        /* In any order: sums of whole numbers are exact. */
#pragma omp critical
        for (int64_t o = 0; p->sum && o < g->out_channels; o++) {
            p->sum[o] += sum[o];
            p->square[o] += sum[sums + o];
        }
    }
}

/* A window of one pixel at a step of one sees no borders. So pixels may stand in rows of any length,
   and are put in long ones: what a row begins with is then done seldom, and every piece is full. */
static geometry with_long_rows(geometry g) {
    int64_t pixels = g.images * g.height * g.width, width = 64;
    if (g.kernel_size != 1 || g.stride != 1 || g.padding) return g;
    while (width && pixels % width) width -= 8;
    if (width <= g.width) return g;
    g.images = 1;
    g.width = g.out_width = width;
    g.height = g.out_height = pixels / width;
    return g;
}

/* signs: the packed input; weight: packed, (out_channels, k, k, words); alpha: (out_channels,) or
   NULL. result: (images, out_height, out_width, out_channels) of the type, or NULL. sum, square:
   (out_channels,), of the sums before alpha and of their squares, or both NULL. */
EXPORT void tritonbnn_conv_packed(const uint32_t *signs, const uint32_t *weight, const float *alpha,
                                  void *result, int64_t type, double *sum, double *square,
                                  const geometry *given, int64_t threads) {
    const geometry long_rows = with_long_rows(*given), *g = &long_rows;
    int64_t words = words_of(g->channels), blocks = ceil_div(g->out_channels, LANES);
    int64_t size = blocks * g->kernel_size * g->kernel_size * words;
    int64_t rows = g->out_height, columns = g->out_width, kinds = 2 * g->kernel_size + 1;
    /* of rows and columns together, at most */
    kinds = smaller(kinds * kinds, larger(rows, 1) * larger(columns, 1));
    size_t bytes = (size + kinds * blocks) * sizeof(uvec) + 2 * (rows + columns) * sizeof(int64_t);
    uvec *arranged = tritonbnn_workspace(WORKSPACE_SHARED, bytes);
    arrange_weight(g, weight, blocks, arranged, threads);
    ivec *whole = (ivec *)(arranged + size);
    int64_t *row_kind = (int64_t *)(whole + kinds * blocks), *column_kind = row_kind + rows;
    int64_t *first_row = column_kind + columns, *first_column = first_row + rows;
    int64_t row_kinds = find_kinds(g, rows, g->height, row_kind, first_row);
    int64_t column_kinds = find_kinds(g, columns, g->width, column_kind, first_column);
    problem p = {g, tritonbnn_padded_signs(signs, g, threads), arranged, whole, row_kind,
                 column_kind, blocks, column_kinds, alpha, result, type, sum, square};
    for (int64_t i = 0; i < row_kinds * column_kinds; i++)
        find_whole(&p, first_row[i / column_kinds], first_column[i % column_kinds],
                   whole + i * blocks);
    convolve(&p, threads);
}
