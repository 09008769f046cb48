/* The page: a picture comes in, the network runs, its likeliest classes are shown. Names of classes
   and of files are only ever text. */

const TOP = 5;
const facts = JSON.parse(document.getElementById("facts").textContent);
const $ = id => document.getElementById(id);
let network = null, pending = Promise.resolve();

/* The bytes of a text of 85 characters, five of which stand for four bytes, as _text85 in
   __init__.py writes it. */
function decode85(text, count) {
    const digits = new Uint8Array(128), bytes = new Uint8Array((text.length / 5) * 4);
    const view = new DataView(bytes.buffer);
    for (let i = 0; i < 85; i++) digits[facts.alphabet.charCodeAt(i)] = i;
    for (let i = 0; i < text.length; i += 5) {
        let number = 0;
        for (let j = i; j < i + 5; j++) number = number * 85 + digits[text.charCodeAt(j)];
        view.setUint32((i / 5) * 4, number);
    }
    return bytes.subarray(0, count);
}

/* The network of this page: run(pixels) gives its logits and the milliseconds that it took. */
async function openNetwork() {
    const packed = decode85($("network").textContent, facts.bytes);
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const code = await new Response(stream).arrayBuffer();
    const { instance } = await WebAssembly.instantiate(code);
    const { memory, __heap_base, net_workspace_bytes, net_run_bytes } = instance.exports;
    const size = facts.size, bytes = net_workspace_bytes(1, size, size);
    const pixels = __heap_base.value;
    const logits = Math.ceil((pixels + facts.channels * size * size) / 4) * 4;
    const workspace = logits + facts.classes.length * 4;
    const missing = workspace + bytes - memory.buffer.byteLength;
    if (missing > 0) memory.grow(Math.ceil(missing / 65536));
    return {
        run(picture) {
            new Uint8Array(memory.buffer).set(picture, pixels);
            const start = performance.now();
            const code = net_run_bytes(pixels, 1, size, size, logits, workspace, bytes);
            const milliseconds = performance.now() - start;
            if (code) throw new Error(`the network ends with code ${code}`);
            return {
                logits: new Float32Array(memory.buffer, logits, facts.classes.length).slice(),
                milliseconds,
            };
        },
    };
}

function softmax(logits) {
    const most = logits.reduce((a, b) => Math.max(a, b));
    const powers = Array.from(logits, logit => Math.exp(logit - most));
    const sum = powers.reduce((a, b) => a + b);
    return powers.map(power => power / sum);
}

function say(text) {
    $("said").textContent = text;
}

function element(kind, className, text) {
    const made = document.createElement(kind);
    made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
}

const percent = share => `${(100 * share).toFixed(1)} %`;

/* What the network sees, enlarged. */
function preview(pixels) {
    const size = facts.size, canvas = $("seen"), image = new ImageData(size, size);
    for (let i = 0; i < size * size; i++) {
        for (let c = 0; c < 3; c++)
            image.data[4 * i + c] = pixels[(facts.channels === 3 ? c * size * size : 0) + i];
        image.data[4 * i + 3] = 255;
    }
    canvas.width = canvas.height = size;
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.hidden = false;
}

function show(shares, milliseconds) {
    const order = shares.map((_, i) => i).sort((a, b) => shares[b] - shares[a] || a - b);
    const rows = order.slice(0, TOP).map(index => {
        const row = element("li", "guess"), bar = element("span", "bar");
        const filled = element("span", "filled");
        filled.style.width = `${100 * shares[index]}%`;
        bar.append(filled);
        row.append(element("bdi", "name", facts.classes[index]),
            element("span", "share", percent(shares[index])), bar);
        return row;
    });
    $("guesses").replaceChildren(...rows);
    say(`${facts.classes[order[0]]}, ${percent(shares[order[0]])}. ` +
        `The network took ${milliseconds.toFixed(1)} ms.`);
}

/* The pixels of a picture over white, as the network's training had what is transparent. */
function pixelsOf(picture, width, height) {
    if (width * height > facts.mostPixels)
        throw new Error(`it has more than ${facts.mostPixels} pixels`);
    const canvas = document.createElement("canvas");
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "white";
    context.fillRect(0, 0, width, height);
    context.drawImage(picture, 0, 0);
    return context.getImageData(0, 0, width, height).data;
}

function classify(picture, width, height) {
    const rgba = pixelsOf(picture, width, height);
    const view = fit(rgba, width, height, facts.channels, facts.size, facts.shorter);
    preview(view);
    const { logits, milliseconds } = network.run(view);
    show(softmax(logits), milliseconds);
}

/* Read a file, after those that came before it. */
function take(file) {
    pending = pending.then(async () => {
        try {
            const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
            const bitmap = await createImageBitmap(file, options);
            classify(bitmap, bitmap.width, bitmap.height);
            bitmap.close();
        } catch (error) {
            $("guesses").replaceChildren();
            $("seen").hidden = true;
            say(`${file.name || "This"} cannot be read as a picture: ${error.message}`);
        }
    });
}

function takeFirst(transfer, event) {
    const file = transfer && [...transfer.files][0];
    if (!file) return;
    event.preventDefault();
    take(file);
}

async function startCamera() {
    try {
        $("video").srcObject = await navigator.mediaDevices.getUserMedia({
            video: { facingMode: "environment" },
        });
        await $("video").play();
        $("camera").hidden = false;
        $("start").hidden = true;
        $("shoot").focus();
        say("The camera is on.");
    } catch (error) {
        say(`There is no camera to use: ${error.message}`);
    }
}

function stopCamera() {
    for (const track of $("video").srcObject.getTracks()) track.stop();
    $("video").srcObject = null;
    $("camera").hidden = true;
    $("start").hidden = false;
    $("start").focus();
}

function shoot() {
    const video = $("video");
    try {
        classify(video, video.videoWidth, video.videoHeight);
    } catch (error) {
        say(`The camera gives no picture: ${error.message}`);
    }
}

async function main() {
    try {
        network = await openNetwork();
        const blank = new Uint8Array(facts.channels * facts.size * facts.size);
        for (let i = 0; i < 3; i++) network.run(blank); /* the browser compiles what is run often */
    } catch (error) {
        say(`This browser does not run the network, which needs WebAssembly with SIMD and` +
            ` DecompressionStream: ${error.message}`);
        return;
    }
    const file = $("file");
    file.addEventListener("change", () => {
        if (file.files[0]) take(file.files[0]);
    });
    addEventListener("paste", event => takeFirst(event.clipboardData, event));
    addEventListener("drop", event => takeFirst(event.dataTransfer, event));
    addEventListener("dragover", event => event.preventDefault());
    $("start").hidden = !navigator.mediaDevices;
    $("start").addEventListener("click", startCamera);
    $("shoot").addEventListener("click", shoot);
    $("stop").addEventListener("click", stopCamera);
    file.disabled = false;
    say("Ready: choose a picture, drop one here, or paste one.");
}

main();
