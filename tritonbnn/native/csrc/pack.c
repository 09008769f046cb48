/* Packed signs: pack, unpack, scale of a weight, difference; and signs as +1 and -1. */
#include <stdlib.h>

#include "tiles.h"
#include "transpose.h"
#include "workspace.h"

typedef struct {
    Numbers x; /* signs as floats */
    uint32_t *signs;
} Packing;

static void pack_signs_tile(const void *pass, const Tile *tile) {
    const Packing *packing = pass;
    pack_tile(packing->x, tile->vectors[0], packing->signs, tile, tile->scratch[0]);
}

/* x: (pixels, channels), FLOAT32 or BFLOAT16. shift: (channels,) or NULL.
signs: (pixels, words). */
EXPORT void tritonbnn_pack_signs(void *x, int64_t type, const float *shift, int64_t pixels,
                                 int64_t channels, uint32_t *signs, int64_t threads) {
    Packing packing = {{x, (Type)type}, signs};
    Pass pass = {
        .tile = pack_signs_tile,
        .pass = &packing,
        .pixels = pixels,
        .channels = channels,
        .vectors = {shift},
    };
    run_pass(&pass, NULL, threads);
}

static void unpack_word(uint32_t word, int64_t count, float *signs) {
    static const uint32_t bits[32] = {
        1u << 0,  1u << 1,  1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,
        1u << 8,  1u << 9,  1u << 10, 1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15,
        1u << 16, 1u << 17, 1u << 18, 1u << 19, 1u << 20, 1u << 21, 1u << 22, 1u << 23,
        1u << 24, 1u << 25, 1u << 26, 1u << 27, 1u << 28, 1u << 29, 1u << 30, 1u << 31,
    };
    #pragma omp simd
    for (int64_t i = 0; i < count; i++)
        signs[i] = word & bits[i] ? 1.0f : -1.0f;
}

static void unpack_tile(const void *pass, const Tile *tile) {
    const Packing *packing = pass;
    int64_t channels = tile->channels, words = words_of(channels);
    const uint32_t *word = packing->signs + tile->pixel * words;
    float *x = floats_for(packing->x, tile, tile->scratch[0]);
    for (int64_t p = 0; p < tile->pixels; p++)
        for (int64_t c = 0; c < channels; c += 32)
            unpack_word(*word++, smaller(32, channels - c), x + p * channels + c);
    write_floats(packing->x, tile, x);
}

/* The inverse: x becomes +1 and -1. */
EXPORT void tritonbnn_unpack_signs(uint32_t *signs, int64_t pixels, int64_t channels, void *x,
                                   int64_t type, int64_t threads) {
    Packing packing = {{x, (Type)type}, signs};
    Pass pass = {
        .tile = unpack_tile, .pass = &packing, .pixels = pixels, .channels = channels};
    run_pass(&pass, NULL, threads);
}

typedef struct {
    Numbers x, signs;
} Signs;

static void sign_tile(const void *pass, const Tile *tile) {
    const Signs *both = pass;
    const float *x = read_floats(both->x, tile, tile->scratch[0]), *shift = tile->vectors[0];
    float *signs = floats_for(both->signs, tile, tile->scratch[1]);
    for (int64_t at = 0; at < tile->floats; at += tile->period) {
        int64_t count = smaller(tile->period, tile->floats - at);
        #pragma omp simd
        for (int64_t i = 0; i < count; i++)
            signs[at + i] = x[at + i] + shift[i] >= 0 ? 1.0f : -1.0f;
    }
    write_floats(both->signs, tile, signs);
}

/* sign(x + shift) as +1 and -1, in x's type. */
EXPORT void tritonbnn_sign_forward(void *x, int64_t type, const float *shift, int64_t pixels,
                                   int64_t channels, void *signs, int64_t threads) {
    Signs both = {{x, (Type)type}, {signs, (Type)type}};
    Pass pass = {
        .tile = sign_tile,
        .pass = &both,
        .pixels = pixels,
        .channels = channels,
        .vectors = {shift},
    };
    run_pass(&pass, NULL, threads);
}

/* A weight (filters, channels, height, width) with its strides, in numbers. */
typedef struct {
    Numbers weight;
    int64_t channels, height, width;
    int64_t filter_stride, channel_stride, row_stride, column_stride;
} Weight;

/* One tap's channels as floats, from the number at first on. */
INLINE void read_tap(const Weight *w, Type type, int64_t first, float *tap) {
    if (w->channel_stride == 1) /* told to the compiler: then it reads whole vectors */
        #pragma omp simd
        for (int64_t c = 0; c < w->channels; c++)
            tap[c] = number(w->weight.data, type, first + c);
    else
        for (int64_t c = 0; c < w->channels; c++)
            tap[c] = number(w->weight.data, type, first + c * w->channel_stride);
}

/* All taps of a filter whose channels are whole kernels of floats, as torch lays them out by itself:
   sixteen channels at a time. taps: [tap][length]; lanes: memory for a vector each. */
static void read_kernels(const Weight *w, const float *filter, int64_t length, float *taps,
                         vec *lanes) {
    int64_t size = w->height * w->width;
    for (int64_t c = 0; c < w->channels; c += LANES) {
        const float *rows[LANES];
        for (int64_t lane = 0; lane < LANES; lane++)
            rows[lane] = c + lane < w->channels ? filter + (c + lane) * w->channel_stride : 0;
        rows_to_lanes(rows, size, lanes);
        for (int64_t t = 0; t < size; t++) memcpy(taps + t * length + c, lanes + t, sizeof(vec));
    }
}

static void read_filter(const Weight *w, int64_t first, int64_t length, float *taps, vec *lanes) {
    int kernels = w->column_stride == 1 && w->row_stride == w->width && w->channel_stride != 1;
    if (kernels && w->weight.type == FLOAT32) {
        read_kernels(w, (const float *)w->weight.data + first, length, taps, lanes);
        return;
    }
    for (int64_t y = 0; y < w->height; y++)
        for (int64_t x = 0; x < w->width; x++, taps += length) {
            int64_t at = first + y * w->row_stride + x * w->column_stride;
            if (w->weight.type == BFLOAT16)
                read_tap(w, BFLOAT16, at, taps);
            else
                read_tap(w, FLOAT32, at, taps);
        }
}

static double sum_of_magnitudes(const float *tap, int64_t channels) {
    double sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < channels; c++)
        sum += __builtin_fabsf(tap[c]);
    return sum;
}

/* packed: (filters, height, width, words). alpha: (filters,), the means of the magnitudes. */
EXPORT void tritonbnn_pack_weight(void *weight, int64_t type, int64_t filters, int64_t channels,
                                  int64_t height, int64_t width, int64_t filter_stride,
                                  int64_t channel_stride, int64_t row_stride,
                                  int64_t column_stride, uint32_t *packed, float *alpha,
                                  int64_t threads) {
    Weight w = {{weight, (Type)type}, channels,   height,       width, filter_stride,
                channel_stride,       row_stride, column_stride};
    int64_t size = height * width, words = words_of(channels);
    int64_t length = ceil_div(channels, LANES) * LANES + LANES; /* readable beyond the channels */
    int64_t bytes = ((size + 1) * length + size * LANES) * (int64_t)sizeof(float);
    #pragma omp parallel num_threads(threads)
    {
        vec *lanes = tritonbnn_workspace(WORKSPACE_OWN, bytes);
        float *zeros = (float *)(lanes + size), *taps = zeros + length;
        memset(lanes, 0, bytes);
        #pragma omp for schedule(static)
        for (int64_t filter = 0; filter < filters; filter++) {
            double sum = 0;
            read_filter(&w, filter * filter_stride, length, taps, lanes);
            for (int64_t t = 0; t < size; t++) {
                sum += sum_of_magnitudes(taps + t * length, channels);
                pack_pixel(taps + t * length, zeros, channels,
                           packed + (filter * size + t) * words);
            }
            alpha[filter] = (float)(sum / (double)(channels * size));
        }
    }
}

/* counts: (rows,), how many bits of a's and b's rows, (rows, words), differ. */
EXPORT void tritonbnn_packed_difference(const uint32_t *a, const uint32_t *b, int64_t rows,
                                        int64_t words, int32_t *counts, int64_t threads) {
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        int32_t count = 0;
        for (int64_t i = row * words; i < (row + 1) * words; i++)
            count += __builtin_popcount(a[i] ^ b[i]);
        counts[row] = count;
    }
}
