"use strict";

/* The network's view of a picture, as tritonbnn/data/views.py makes it with Pillow: the shorter side
   is resized, and the centre is cut out. A canvas would resize otherwise, and other pixels can have
   another answer. */

const BITS = 22; /* of a weight, below the point: Pillow computes with whole numbers */

/* Which inputs an output is made of, and their weights: those of a triangle, as wide as two steps of
   the coarser grid.

   length: of the input; resized: of the whole output, of which `count` from `start` on are wanted. */
function findTaps(length, resized, start, count) {
    const scale = length / resized, support = Math.max(scale, 1), taps = [];
    for (let i = start; i < start + count; i++) {
        const centre = (i + 0.5) * scale;
        const first = Math.max(Math.trunc(centre - support + 0.5), 0);
        const last = Math.min(Math.trunc(centre + support + 0.5), length);
        const weights = new Float64Array(last - first);
        let sum = 0;
        for (let j = 0; j < weights.length; j++) {
            weights[j] = Math.max(1 - Math.abs((j + first - centre + 0.5) / support), 0);
            sum += weights[j];
        }
        const whole = Int32Array.from(weights, weight => 0.5 + (weight / sum) * (1 << BITS));
        taps.push({ first, weights: whole });
    }
    return taps;
}

/* Resize along one side. Numbers lie at line * lineStep + place * placeStep; the result is
   [line][output] where `turned` is false, else [output][line]. */
function resample(numbers, lines, lineStep, placeStep, taps, turned) {
    const result = new Uint8Array(lines * taps.length);
    for (let line = 0; line < lines; line++)
        for (let i = 0; i < taps.length; i++) {
            const { first, weights } = taps[i];
            let sum = 1 << (BITS - 1), at = line * lineStep + first * placeStep;
            for (let j = 0; j < weights.length; j++, at += placeStep) sum += numbers[at] * weights[j];
            result[turned ? i * lines + line : line * taps.length + i] = sum >> BITS;
        }
    return result;
}

/* One channel of a picture as the network sees it, size x size.

   plane: numbers of which every `step`-th from `offset` on is of this channel, row by row. */
function fitPlane(plane, offset, step, width, height, size, shorter) {
    const [across, down] = [width, height].map(length => {
        const resized = Math.trunc((shorter * length) / Math.min(width, height));
        return findTaps(length, resized, roundHalfToEven((resized - size) / 2), size);
    });
    const top = down[0].first, end = down[size - 1];
    const rows = end.first + end.weights.length - top;
    const from = plane.subarray(offset + top * width * step);
    const narrow = resample(from, rows, width * step, step, across, true); /* [column][row] */
    const moved = down.map(({ first, weights }) => ({ first: first - top, weights }));
    return resample(narrow, size, rows, 1, moved, true); /* [row][column] */
}

/* As Python rounds. */
function roundHalfToEven(number) {
    const below = Math.floor(number);
    return number - below === 0.5 ? below + (below % 2) : Math.round(number);
}

/* A picture as the network sees it: Uint8Array, [channel][row][column].

   rgba: what a canvas gives, opaque. channels: 3, or 1 for grey. */
function fit(rgba, width, height, channels, size, shorter) {
    const result = new Uint8Array(channels * size * size);
    if (channels === 1) {
        const grey = new Uint8Array(width * height);
        for (let i = 0; i < grey.length; i++)
            grey[i] = (rgba[4 * i] * 19595 + rgba[4 * i + 1] * 38470 + rgba[4 * i + 2] * 7471 +
                0x8000) >> 16;
        result.set(fitPlane(grey, 0, 1, width, height, size, shorter));
    } else {
        for (let c = 0; c < 3; c++)
            result.set(fitPlane(rgba, c, 4, width, height, size, shorter), c * size * size);
    }
    return result;
}
