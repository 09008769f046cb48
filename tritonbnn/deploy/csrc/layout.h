/* Where everything of a call lies: sizes, streams, and maps of signs. */
#ifndef TRITONBNN_LAYOUT_H
#define TRITONBNN_LAYOUT_H

#include "engine.h"
#include "lanes.h"

/* A stream: [block of channels][row][column][lane]. What a block's outputs read and write lies side
   by side then. Images follow one another. It may have memory for some rows only: row r is then at
   r % rows. */
typedef struct {
    float *numbers;
    int64_t rows, width, plane; /* plane: floats of a block */
} Stream;

/* A unit at its place. */
typedef struct {
    const Unit *unit;
    int64_t height, width, out_height, out_width;
    int64_t words;      /* of an input pixel's signs */
    int64_t blocks;     /* of the output's channels */
    int64_t chunk_rows; /* of the output, that are computed at a time */
    Stream in, out;     /* of the same memory where the shortcut is the input itself */
    uint32_t *map;      /* the input's signs, with zeros around them for a 3 x 3 kernel */
    uint32_t *next;     /* the next unit's map; NULL for the last */
    int64_t next_words, next_pad;
} Placed;

/* How a group of images is run by one thread, or by all of them together. */
typedef struct {
    int64_t images;                  /* of a group at most */
    int64_t pad;                     /* of the stem's convolution */
    int64_t stem_height, stem_width; /* after it */
    int64_t first_height;            /* of the first stream */
    int64_t stem_chunk_rows;
    int64_t flowing; /* units, the first ones, that are computed row by row, each behind the other */
    float *padded;   /* [image][row][column][channel], with zeros around */
    float *raw;      /* the stem's output where it is pooled */
    Stream first;
    uint32_t *map;   /* the signs of the first stream */
    Stream last;
    int64_t last_pixels; /* of an image */
    char *maps;          /* all maps of signs */
    int64_t map_bytes;
    float *scratch; /* of each thread: PROJECT's pooled pixels */
    int64_t scratch_floats;
    Placed *units;
    int64_t bytes; /* of all of it */
} Layout;

enum { CHUNK = 128, MOST_GROUPS = 16 }; /* pixels of a chunk; groups of units that flow */

INLINE int64_t blocks_of(int64_t channels) { return (channels + LANES - 1) / LANES; }

INLINE int64_t words_of(int64_t channels) { return (channels + 31) / 32; }

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* DONE if every count of the network is what its sizes ask for, else BAD_NETWORK. */
INTERNAL int64_t tritonbnn_check_network(const Network *network);

/* Where the group of units ends that begins at `first`: a unit, and those of 1 x 1 behind it. A
   thread that has some pixels of the first can go on to these pixels of the others. */
INTERNAL int64_t tritonbnn_group_end(const Network *network, int64_t first);

/* Pixels of a unit's chunk: its stream and the weights that it meets both stay in near caches. */
INTERNAL int64_t tritonbnn_chunk_pixels(const Unit *unit);

/* Lay a group of images out from `workspace` on; NULL to learn the bytes alone. DONE or BAD_SIZE.

   threads: who share the group. Streams flow only if it is one. */
INTERNAL int64_t tritonbnn_lay_out(const Network *network, int64_t height, int64_t width,
                                   int64_t images, int64_t threads, char *workspace,
                                   Layout *layout);

#endif
