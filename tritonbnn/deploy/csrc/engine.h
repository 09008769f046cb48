/* A packed network as its caller describes it, and the call that runs it.

   tritonbnn/deploy/order.py makes the arrays, and native.py fills these structures in. Nothing
   here is trusted: layout.c compares every count with what the sizes ask for before anything is
   read. */
#ifndef TRITONBNN_ENGINE_H
#define TRITONBNN_ENGINE_H

#include <stdint.h>

/* What a caller sees, and what only these files see of one another. Where all of them are one file,
   as tritonbnn/deploy/program.py writes it, both are static. */
#ifndef EXPORT
#define EXPORT __attribute__((visibility("default")))
#define INTERNAL
#endif

/* What a unit adds to its normalised product. PROJECT: the 2 x 2 means, times a real 1 x 1
   convolution. */
typedef enum { IDENTITY, REPEAT, POOL, PROJECT } Shortcut;

/* Numbers in memory, and how many there are. */
typedef struct {
    const float *numbers;
    int64_t count;
} Floats;

/* Blocks are of LANES output channels. What pads the last block is 0, and 1 in a threshold. */
typedef struct {
    int64_t channels, out_channels, kernel_size, stride, shortcut;
    const uint32_t *weight; /* [block][tap][word of the input][lane] */
    int64_t weight_count;
    Floats whole;   /* [cut rows][cut columns][channel]: the sum if no bit differed; for a 1 x 1
                       kernel only [channel] */
    Floats vectors; /* [scale, constant, slope, shift out, threshold of the next sign][channel] */
    Floats projection; /* [block][input channel][lane], then an offset [channel] */
} Unit;

typedef struct {
    int64_t in_channels, classes;
    int64_t stem_channels, stem_kernel_size, stem_stride;
    int64_t stem_pools; /* 1 where a 3 x 3 maximum of stride 2 follows the stem */
    int64_t unit_count;
    const Unit *units;
    Floats stem; /* [block][tap][input channel][lane], then offset and threshold of the next sign */
    Floats head; /* [block of HEAD_LANES classes][feature][lane], then an offset [class] */
} Network;

/* The functions of an OpenMP library, all NULL where there is none. */
typedef struct {
    void (*parallel)(void (*work)(void *), void *of, unsigned threads, unsigned flags);
    void (*barrier)(void);
    int (*member)(void);
    int (*members)(void);
} Team;

typedef struct {
    const void *images; /* [image][channel][row][column] */
    int64_t number_count;
    int64_t bytes_a_number; /* 4: floats; 1: bytes, which the table gives a meaning */
    Floats table;           /* [channel][byte]; none for floats */
    int64_t image_count, height, width;
    float *logits; /* [image][class] */
    int64_t logit_count;
    char *workspace; /* on a cache line */
    int64_t workspace_bytes;
    int64_t threads;
    Team team;
} Call;

enum { DONE, BAD_NETWORK, BAD_SIZE, SMALL_WORKSPACE, NOT_FINITE };

/* Bytes of workspace that a call needs; a negative code where the network or its sizes are bad. */
EXPORT int64_t tritonbnn_engine_workspace(const Network *network, const Call *call);

/* One of the codes above. The logits are written only if it is DONE or NOT_FINITE, which says that
   a number of an image is infinite or none. */
EXPORT int64_t tritonbnn_engine_run(const Network *network, const Call *call);

#endif
