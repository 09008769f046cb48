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
#include "workspace.h"

#define PIXELS 4 /* outputs side by side whose counts stay in registers */

/* The 16 lanes as one register or as several, whatever the machine has. Bits are counted in parts
   that are cheap to add, and a lane's parts are joined at the end: one part a lane where an
   instruction counts bits, else one a byte, which holds the counts of 31 words. */
#if defined(__AVX512VPOPCNTDQ__)
enum { REGISTERS = 1 };
#define PARTS_HOLD INT64_MAX
#elif defined(__AVX2__)
enum { REGISTERS = 2 };
#define PARTS_HOLD 31
#else
enum { REGISTERS = 4 };
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
    lanes totals[PIXELS][REGISTERS] = {{{0}}};
    for (int64_t ty = 0; ty < g->kernel_size; ty++, input += p->map.row)
        for (int64_t at = 0; at < row;) {
            int64_t last = row - at < PARTS_HOLD ? row : at + PARTS_HOLD;
            lanes parts[PIXELS][REGISTERS] = {{{0}}};
            for (; at < last; at++, weight += REGISTERS)
                for (int i = 0; i < pixels; i++)
                    for (int r = 0; r < REGISTERS; r++)
                        parts[i][r] += count_parts(weight[r] ^ input[at + i * step]);
            for (int i = 0; i < pixels; i++)
                for (int r = 0; r < REGISTERS; r++) totals[i][r] += join_parts(parts[i][r]);
        }
    memcpy(counts, totals, pixels * sizeof *counts);
}

/* Store the sums of 16 output channels at a pixel, in the result's type, scaled if need be. */
INLINE void store_sums(const problem *p, int64_t pixel, int64_t block, ivec sums) {
    int64_t first = block * LANES, count = smaller(LANES, p->g->out_channels - first);
    int64_t at = pixel * p->g->out_channels + first;
    if (p->type == INT16) {
        short_vec narrow = __builtin_convertvector(sums, short_vec);
        memcpy((int16_t *)p->result + at, &narrow, count * sizeof(int16_t));
    } else if (p->type == INT32) {
        memcpy((int32_t *)p->result + at, &sums, count * sizeof(int32_t));
    } else {
        vec real = __builtin_convertvector(sums, vec);
        if (p->alpha) real *= load_some(p->alpha, FLOAT32, first, count);
        store_some(p->result, p->type, at, real, count);
    }
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

INLINE void row_piece(const problem *p, int64_t row, int64_t block, int64_t x, int pixels,
                      moments *m) {
    const geometry *g = p->g;
    int64_t image = row / g->out_height, y = row % g->out_height;
    const uint32_t *input = p->map.words + image * p->map.image +
                            y * g->stride * p->map.row + x * g->stride * p->map.pixel;
    ivec counts[PIXELS];
    differences(p, input, block, pixels, counts);
    const ivec *whole = p->whole + p->row_kind[y] * p->column_kinds * p->blocks;
    for (int i = 0; i < pixels; i++) {
        ivec sums = whole[p->column_kind[x + i] * p->blocks + block] - 2 * counts[i];
        if (p->result) store_sums(p, row * g->out_width + x + i, block, sums);
        if (p->sum) add_moments(m, sums);
    }
}

static void convolve_row(const problem *p, int64_t row, int64_t block, double *sum,
                         double *square) {
    const geometry *g = p->g;
    moments m = {{{0}}, {{0}}};
    int64_t x = 0;
    for (; x + PIXELS <= g->out_width; x += PIXELS) row_piece(p, row, block, x, PIXELS, &m);
    for (; x < g->out_width; x++) row_piece(p, row, block, x, 1, &m);
    for (int64_t lane = 0; p->sum && lane < LANES; lane++) {
        sum[block * LANES + lane] += m.sum[lane / 8][lane % 8];
        square[block * LANES + lane] += m.square[lane / 8][lane % 8];
    }
}

/* The weight by lanes of output channels: (blocks, k, k, words) from (out_channels, k, k, words). */
static void arrange_weight(const geometry *g, const uint32_t *weight, uvec *arranged) {
    int64_t size = g->kernel_size * g->kernel_size * words_of(g->channels);
    for (int64_t o = 0; o < g->out_channels; o++)
        for (int64_t i = 0; i < size; i++)
            arranged[o / LANES * size + i][o % LANES] = weight[o * size + i];
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

/* signs: the packed input; weight: packed, (out_channels, k, k, words); alpha: (out_channels,) or
   NULL. result: (images, out_height, out_width, out_channels) of the type, or NULL. sum, square:
   (out_channels,), of the sums before alpha and of their squares, or both NULL. */
EXPORT void tritonbnn_conv_packed(const uint32_t *signs, const uint32_t *weight, const float *alpha,
                                  void *result, int64_t type, double *sum, double *square,
                                  const geometry *g, int64_t threads) {
    int64_t words = words_of(g->channels), blocks = ceil_div(g->out_channels, LANES);
    int64_t size = blocks * g->kernel_size * g->kernel_size * words;
    int64_t rows = g->out_height, columns = g->out_width, kinds = 2 * g->kernel_size + 1;
    /* of rows and columns together, at most */
    kinds = smaller(kinds * kinds, larger(rows, 1) * larger(columns, 1));
    size_t bytes = (size + kinds * blocks) * sizeof(uvec) + 2 * (rows + columns) * sizeof(int64_t);
    uvec *arranged = tritonbnn_workspace(WORKSPACE_SHARED, bytes);
    memset(arranged, 0, size * sizeof(uvec));
    arrange_weight(g, weight, arranged);
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
