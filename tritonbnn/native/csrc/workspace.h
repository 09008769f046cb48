/* Memory that a thread keeps between calls: new pages cost more than the work done in them. */
#ifndef TRITONBNN_WORKSPACE_H
#define TRITONBNN_WORKSPACE_H

#include <stddef.h>

enum workspace_slot {
    WORKSPACE_SHARED, /* of the calling thread, read by all threads of a call */
    WORKSPACE_PADDED, /* a padded map of packed signs, of the calling thread too */
    WORKSPACE_OWN,    /* of each thread of a call */
    WORKSPACE_PARTS,  /* of long sums, of the calling thread */
    /* Of a whole unit, of the calling thread. */
    WORKSPACE_MOMENTS,
    WORKSPACE_CONVOLVED,
    WORKSPACE_DU,
    WORKSPACE_DY,
    WORKSPACE_DSIGNS,
    WORKSPACE_SLOTS
};

/* At least so many bytes, aligned to 64; what they held before is lost. Never NULL: it aborts when
   memory is out, as torch's own allocator would raise. */
void *tritonbnn_workspace(enum workspace_slot slot, size_t bytes);

#endif
