#include "workspace.h"

#include <stdio.h>
#include <stdlib.h>

static _Thread_local struct {
    void *memory;
    size_t bytes;
} kept[WORKSPACE_SLOTS];

void *tritonbnn_workspace(enum workspace_slot slot, size_t bytes) {
    size_t rounded = (bytes + 4095) / 4096 * 4096;
    if (kept[slot].bytes >= bytes && kept[slot].memory) return kept[slot].memory;
    free(kept[slot].memory);
    kept[slot].memory = aligned_alloc(64, rounded ? rounded : 4096);
    kept[slot].bytes = rounded;
    if (!kept[slot].memory) {
        fprintf(stderr, "tritonbnn: out of memory: %zu bytes wanted for work\n", rounded);
        abort();
    }
    return kept[slot].memory;
}
