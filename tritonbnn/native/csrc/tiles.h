/* Passes over (pixels, channels) in tiles that fit the first cache, as plain loops over floats.

A vector with one value per channel is repeated until it has a few hundred values: one period.
Loops then run over periods of whole pixels, and 7 channels cost no more than 16. Numbers of other
types become floats in a tile's scratch memory first.
*/
#ifndef TRITONBNN_TILES_H
#define TRITONBNN_TILES_H

#include "passes.h"
#include "vector.h"

enum {
    VECTORS = 6, /* a pass takes at most */
    SCRATCH = 5, /* arrays of scratch memory in a tile */
    ROWS = 4     /* periods whose terms are added before a sum is stored */
};

/* What a pass works on at a time. */
typedef struct {
    int64_t channels;
    int64_t period; /* floats */
    int64_t pixel;  /* the first */
    int64_t pixels;
    int64_t floats;                /* pixels * channels */
    const float *vectors[VECTORS]; /* the pass's, a period each, and LANES more to read */
    float *scratch[SCRATCH];       /* a tile each, and LANES more to read */
    float *sums;                   /* [the pass's sums][period], to be added to */
    double *wide_sums;             /* [the pass's wide sums][period], to be added to */
} Tile;

/* A pass. Its results are the same for every number of threads. */
typedef struct {
    void (*tile)(const void *pass, const Tile *tile); /* gets pass as it is */
    const void *pass;
    int64_t pixels, channels;
    const float *vectors[VECTORS]; /* [channels] each; NULL for zeros */
    int64_t sums, wide_sums;       /* how many sums per channel a tile adds to */
} Pass;

/* Run a pass over all pixels. totals: [sums + wide_sums][channels], or NULL if there are none. */
void run_pass(const Pass *pass, double *totals, int64_t threads);

/* Memory on a cache line; the process ends where there is none. */
void *allocate(int64_t bytes);

/* A tile of numbers as floats: where they lie, or in scratch memory. Readable for LANES more. */
const float *read_padded(Numbers numbers, const Tile *tile, float *scratch);

/* The same without the LANES more. */
const float *read_floats(Numbers numbers, const Tile *tile, float *scratch);

/* Where to compute a tile of floats: their own memory, or scratch memory if that has another type
or there is none. */
float *floats_for(Numbers numbers, const Tile *tile, float *scratch);

/* Afterwards, round the floats into their own memory, if they are not there yet. */
void write_floats(Numbers numbers, const Tile *tile, const float *floats);

/* Pack a tile's signs: a bit is 1 iff x + shift >= 0. shift is one of the tile's vectors. */
void pack_tile(Numbers x, const float *shift, uint32_t *signs, const Tile *tile, float *scratch);

/* The same for one pixel, whose LANES next floats are readable, as are those of shift. */
void pack_pixel(const float *x, const float *shift, int64_t channels, uint32_t *words);

#endif
