#include <stdio.h>
#include <stdlib.h>

#include "tiles.h"

enum {
    PERIOD = 256,     /* floats of a period at least: the loops over it have something to do */
    TILE = 2048,      /* floats of a tile, unless ROWS periods are more */
    BLOCKS = 64,      /* into which a pass is cut at least, if they get FEW_ROWS each */
    FEW_ROWS = 32,    /* periods of a block at least: joining sums costs little then */
    MANY_ROWS = 128,  /* at most: a float sum has few terms then and stays accurate */
    JOINED = 64       /* sums that are joined at a time */
};

/* How a pass is cut, by shape alone: a block's sums are its own and joined in order. */
typedef struct {
    int64_t period, period_pixels, tile_pixels, block_pixels, blocks;
} Cut;

static Cut cut(const Pass *pass) {
    Cut c;
    c.period_pixels = (PERIOD + pass->channels - 1) / pass->channels;
    c.period = c.period_pixels * pass->channels;
    int64_t tile_rows = larger(1, TILE / (ROWS * c.period)) * ROWS;
    c.tile_pixels = tile_rows * c.period_pixels;
    int64_t rows = (pass->pixels + c.period_pixels - 1) / c.period_pixels;
    int64_t block_rows = smaller(larger(rows / BLOCKS, FEW_ROWS), MANY_ROWS);
    c.block_pixels = (block_rows + tile_rows - 1) / tile_rows * c.tile_pixels;
    c.blocks = (pass->pixels + c.block_pixels - 1) / c.block_pixels;
    return c;
}

void *allocate(int64_t bytes) {
    void *memory = aligned_alloc(64, ((size_t)bytes + 64) / 64 * 64);
    if (!memory) {
        fputs("tritonbnn: out of memory\n", stderr);
        abort();
    }
    return memory;
}

/* The pass's vectors, each repeated for a period and LANES more. */
static float *repeat_vectors(const Pass *pass, int64_t period) {
    int64_t length = period + LANES;
    float *repeated = allocate(VECTORS * length * (int64_t)sizeof(float));
    memset(repeated, 0, VECTORS * length * sizeof(float));
    for (int v = 0; v < VECTORS; v++)
        if (pass->vectors[v])
            for (int64_t start = 0; start < period; start += pass->channels)
                memcpy(repeated + v * length + start, pass->vectors[v],
                       pass->channels * sizeof(float));
    return repeated;
}

/* A tile with memory of its own, which scratch[0] holds, wide_sums first. */
static Tile tile_with_memory(const Pass *pass, const Cut *c, const float *repeated) {
    int64_t length = c->tile_pixels * pass->channels + LANES;
    int64_t floats = SCRATCH * length + pass->sums * c->period + LANES;
    int64_t bytes = floats * (int64_t)sizeof(float);
    char *memory = allocate(bytes + pass->wide_sums * c->period * (int64_t)sizeof(double));
    Tile tile = {.channels = pass->channels, .period = c->period};
    for (int v = 0; v < VECTORS; v++)
        tile.vectors[v] = repeated + v * (c->period + LANES);
    for (int s = 0; s < SCRATCH; s++)
        tile.scratch[s] = (float *)memory + s * length;
    tile.sums = tile.scratch[0] + SCRATCH * length;
    tile.wide_sums = (double *)(memory + bytes / 64 * 64);
    return tile;
}

static void run_block(const Pass *pass, const Cut *c, int64_t block, Tile *tile) {
    int64_t first = block * c->block_pixels;
    int64_t end = smaller(first + c->block_pixels, pass->pixels);
    for (tile->pixel = first; tile->pixel < end; tile->pixel += tile->pixels) {
        tile->pixels = smaller(c->tile_pixels, end - tile->pixel);
        tile->floats = tile->pixels * tile->channels;
        pass->tile(pass->pass, tile);
    }
}

/* The sums of a block, its periods folded: partial is [sums + wide_sums][channels]. */
static void fold_sums(const Pass *pass, const Tile *tile, double *partial) {
    memset(partial, 0, (pass->sums + pass->wide_sums) * pass->channels * sizeof(double));
    for (int64_t s = 0; s < pass->sums; s++, partial += pass->channels)
        for (int64_t start = 0; start < tile->period; start += pass->channels)
            for (int64_t c = 0; c < pass->channels; c++)
                partial[c] += tile->sums[s * tile->period + start + c];
    for (int64_t s = 0; s < pass->wide_sums; s++, partial += pass->channels)
        for (int64_t start = 0; start < tile->period; start += pass->channels)
            for (int64_t c = 0; c < pass->channels; c++)
                partial[c] += tile->wide_sums[s * tile->period + start + c];
}

/* Add up the blocks' sums from first on, in the order of the blocks. */
static void join_sums(const double *partial, int64_t blocks, int64_t count, int64_t first,
                      double *totals) {
    int64_t end = smaller(first + JOINED, count);
    memset(totals + first, 0, (end - first) * sizeof(double));
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t i = first; i < end; i++)
            totals[i] += partial[block * count + i];
}

void run_pass(const Pass *pass, double *totals, int64_t threads) {
    int64_t sums = (pass->sums + pass->wide_sums) * pass->channels;
    if (!sums && !pass->pixels)
        return;
    Cut c = cut(pass);
    double *partial = allocate(c.blocks * sums * (int64_t)sizeof(double));
    float *repeated = repeat_vectors(pass, c.period);
    #pragma omp parallel num_threads(threads) if (c.blocks > 1)
    {
        Tile tile = tile_with_memory(pass, &c, repeated);
        #pragma omp for schedule(static)
        for (int64_t block = 0; block < c.blocks; block++) {
            memset(tile.sums, 0, pass->sums * c.period * sizeof(float));
            memset(tile.wide_sums, 0, pass->wide_sums * c.period * sizeof(double));
            run_block(pass, &c, block, &tile);
            fold_sums(pass, &tile, partial + block * sums);
        }
        #pragma omp for schedule(static)
        for (int64_t first = 0; first < sums; first += JOINED)
            join_sums(partial, c.blocks, sums, first, totals);
        free(tile.scratch[0]);
    }
    free(repeated);
    free(partial);
}

INLINE void convert(const void *data, Type type, int64_t first, int64_t count, float *floats) {
    #pragma omp simd
    for (int64_t i = 0; i < count; i++)
        floats[i] = number(data, type, first + i);
}

const float *read_floats(Numbers numbers, const Tile *tile, float *scratch) {
    int64_t first = tile->pixel * tile->channels;
    switch (numbers.type) {
    case BFLOAT16:
        convert(numbers.data, BFLOAT16, first, tile->floats, scratch);
        return scratch;
    case INT16:
        convert(numbers.data, INT16, first, tile->floats, scratch);
        return scratch;
    case INT32:
        convert(numbers.data, INT32, first, tile->floats, scratch);
        return scratch;
    default:
        return (const float *)numbers.data + first;
    }
}

const float *read_padded(Numbers numbers, const Tile *tile, float *scratch) {
    const float *floats = read_floats(numbers, tile, scratch);
    if (floats != scratch)
        memcpy(scratch, floats, tile->floats * sizeof(float));
    return scratch;
}

float *floats_for(Numbers numbers, const Tile *tile, float *scratch) {
    if (!numbers.data || numbers.type != FLOAT32)
        return scratch;
    return (float *)numbers.data + tile->pixel * tile->channels;
}

void write_floats(Numbers numbers, const Tile *tile, const float *floats) {
    if (!numbers.data || numbers.type != BFLOAT16)
        return;
    bfloat16 *rounded = (bfloat16 *)numbers.data + tile->pixel * tile->channels;
    #pragma omp simd
    for (int64_t i = 0; i < tile->floats; i++)
        rounded[i] = to_bfloat16(floats[i]);
}

void pack_pixel(const float *x, const float *shift, int64_t channels, uint32_t *words) {
    for (int64_t c = 0; c < channels; c += 32) {
        int64_t left = channels - c;
        uint32_t word = not_negative(load(x + c) + load(shift + c));
        if (left > LANES)
            word |= not_negative(load(x + c + LANES) + load(shift + c + LANES)) << LANES;
        if (left < 32)
            word &= (1u << left) - 1;
        words[c / 32] = word;
    }
}

void pack_tile(Numbers x, const float *shift, uint32_t *signs, const Tile *tile, float *scratch) {
    int whole = tile->channels % LANES == 0; /* no pixel is read beyond its end */
    const float *floats = (whole ? read_floats : read_padded)(x, tile, scratch);
    int64_t words = words_of(tile->channels);
    for (int64_t p = 0; p < tile->pixels; p++)
        pack_pixel(floats + p * tile->channels, shift, tile->channels,
                   signs + (tile->pixel + p) * words);
}
