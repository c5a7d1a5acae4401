#!/usr/bin/env python3
"""Makes the inputs from which the corpora of devices, disk images and kernels began: each reaches deep by itself. `cargo fuzz` and `TENON_FUZZ_SAVE=1` add to them.

Needs qemu-img (qemu-utils). The forms of inputs are described at the targets, and in sdk/testkit/src/fuzz.rs.
"""
import os, struct, subprocess, tempfile

HERE = os.path.dirname(os.path.abspath(__file__))

def put(target, name, data):
    folder = os.path.join(HERE, "corpus", target)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, name), "wb") as out:
        out.write(data)

# Deeds, as sdk/testkit/src/virtio/fuzz.rs reads them.
ALL = b"\x01"
LENGTHS = [0, 1, 2, 4, 12, 13, 20, 21, 496, 512, 513, 1526, 4096, 4097, 65536, 65562]

def chosen(features):
    return b"\0" + struct.pack("<Q", features)

def request(first=b"", more=0, room=0):
    return bytes([len(first), LENGTHS.index(more) << 4 | LENGTHS.index(room)]) + first

def submit(queue, *requests):
    return bytes([queue << 4, len(requests) - 1]) + b"".join(requests)

def deed(op, which=0, *args):
    return bytes([which << 4 | op, *args])

def header(kind, sector):
    return struct.pack("<IIQ", kind, 0, sector)

def spread(sector, count, flags=0):
    return struct.pack("<QII", sector, count, flags)

ROUND, DAMAGE, RESET, ADVANCE = deed(6), deed(6, 8, 3, 1), deed(7) + ALL, deed(8, 0, 36)

def blk():
    write, read = header(1, 8), header(0, 8)
    plain = submit(0, request(write, 512, 1)) + submit(0, request(read, 0, 513)) + submit(0, request(header(4, 0), 0, 1))
    ranges = submit(0, request(header(11, 0) + spread(8, 16), 0, 1), request(header(13, 0) + spread(0, 8, 1), 0, 1))
    put("virtio_blk", "plain", b"\0" + ALL + plain + submit(0, request(header(8, 0), 0, 21)) + ranges + submit(0, request(header(99, 0), 0, 1)))
    held = deed(10, 0, 0) + plain + ROUND + deed(10, 0, 129) + ranges + DAMAGE + deed(10, 0, 64)
    put("virtio_blk", "held", b"\1" + ALL + held + submit(2, request(read, 0, 4097)))
    put("virtio_blk", "faults", b"\0" + ALL + b"".join(deed(11, 0, n) + plain + ranges for n in range(6)) + deed(12, 0, 0, 1) + plain)
    put("virtio_blk", "through", b"\3" + chosen(0) + plain + deed(5, 0, 4, 32) + struct.pack("<Q", 0) + plain + RESET + plain)
    put("virtio_blk", "read-only", b"\2" + ALL + plain + ranges + deed(5, 0, 3, 0))

def net():
    room = submit(0, *[request(room=1526)] * 4)
    frame = lambda form: deed(10, form) + bytes(12)
    send = submit(1, request(bytes(12), 512), request(bytes(10)), request(bytes(12), 12))
    commands = [b"\0\0\1", b"\1\0" + struct.pack("<I", 1) + bytes(6) + struct.pack("<I", 0), b"\1\1\2\0\0\0\0\1", b"\5\0" + struct.pack("<Q", 1), b"\4\0\1\0", b"\7\7"]
    control = b"".join(submit(2, request(command, 0, 1)) for command in commands)
    put("virtio_net", "frames", b"\0" + ALL + room + frame(8) + frame(11) + frame(13) + send + ROUND + room + frame(9))
    put("virtio_net", "commands", b"\0" + ALL + control + DAMAGE + deed(5, 0, 3, 0) + deed(12, 8, 0, 5) + deed(9, 0) + room + frame(9) + deed(9, 1) + send)
    put("virtio_net", "plain", b"\2" + chosen(0) + room + frame(8) + frame(15) + control + RESET + room + frame(9))
    put("virtio_net", "pairs", b"\1" + ALL + submit(4, request(b"\4\0\2\0", 0, 1)) + submit(3, request(bytes(12), 512)) + submit(2, request(room=1526)) + room + frame(9))

def console():
    say = lambda port, event, value: submit(3, request(struct.pack("<IHH", port, event, value)))
    listen = submit(2, *[request(room=512)] * 4)
    begin = listen + say(0xffffffff, 0, 1) + say(0, 3, 1) + listen + say(0, 6, 1)
    io = submit(0, request(room=20), request(room=0)) + deed(10, 0, 5) + b"hello" + submit(1, request(b"out", 512), request())
    stall = deed(12, 0, 3) + submit(1, request(b"long", 4096)) + ROUND + deed(11) + DAMAGE + deed(12, 0, 255) + deed(11) * 9
    put("virtio_console", "ports", b"\1" + ALL + begin + say(1, 3, 1) + say(1, 6, 1) + io + submit(4, request(room=12)) + deed(10, 1, 3) + b"abc")
    put("virtio_console", "plain", b"\0" + chosen(0) + io + stall + deed(5, 0, 4, 8) + struct.pack("<Q", 65) + RESET + io)
    put("virtio_console", "size", b"\2" + ALL + begin + deed(9) + deed(9, 1) + deed(5, 0, 3, 0) + io + stall)

def rng():
    put("virtio_rng", "plain", ALL + submit(0, request(room=4096), request(b"x", 512, 65562), request()) + ROUND + RESET + submit(0, request(room=1)))

def balloon():
    pages = struct.pack("<IIII", 1, 2, 0x3fff, 0x4000)
    stats = b"".join(struct.pack("<HQ", tag, 1 << 20) for tag in range(8))
    both = submit(0, request(pages, 2)) + submit(1, request(pages)) + submit(4, request(room=4096), request(room=4097))
    ask = submit(2, request(stats, 1)) + ADVANCE + submit(2, request(stats)) + ROUND
    put("virtio_balloon", "all", b"\1" + ALL + both + ask + submit(3, request(room=65536)) + deed(5, 0, 6, 4) + struct.pack("<Q", 7) + ADVANCE)
    put("virtio_balloon", "moved", b"\2" + chosen(0) + both + b"".join(deed(9, n) for n in range(5)) + submit(2, request(room=4096)) + DAMAGE + RESET + both + ask)

class Fuse:
    """Requests to a file system. Node 1 is the folder; what is told of first is 2. The first file that is opened is 0."""
    def __init__(self):
        self.unique = 0

    def ask(self, op, node, body=b"", room=512, more=0, queue=1):
        self.unique += 1
        head = struct.pack("<IIQQIIII", 40 + len(body) + more, op, self.unique, node, 0, 0, 1, 0)
        return submit(queue, request(head + body, more, room))

    def init(self):
        return self.ask(26, 0, struct.pack("<IIII", 7, 38, 4096, 0xffffffff))

    def create(self, name, flags=2, node=1):
        return self.ask(35, node, struct.pack("<IIII", flags, 0o644, 0, 0) + name)

    def open(self, node, flags=2, op=14):
        return self.ask(op, node, struct.pack("<II", flags, 0))

    def write(self, node, file, position, length):
        return self.ask(16, node, struct.pack("<QQIIQII", file, position, length, 0, 0, 0, 0), 496, length)

    def read(self, node, file, position=0, length=4096, op=15, room=4096):
        return self.ask(op, node, struct.pack("<QQIIQII", file, position, length, 0, 0, 0, 0), room)

    def set(self, node, valid, size=0, file=0, mode=0o640):
        return self.ask(4, node, struct.pack("<IIQQQQQQIIIIIIII", valid, 0, file, size, 0, 1, 2, 0, 3, 4, 0, mode, 0, 0, 0, 0))

    def close(self, node, file, op=18):
        return self.ask(op, node, struct.pack("<QIIQ", file, 0, 0, 0))

    def sync(self, node, file, op=20):
        return self.ask(op, node, struct.pack("<QII", file, 1, 0))

    def space(self, node, file, length, how):
        return self.ask(43, node, struct.pack("<QQQII", file, 0, length, how, 0))

    def seek(self, node, file, whence):
        return self.ask(46, node, struct.pack("<QQII", file, 0, whence, 0))

    def forget(self, node, count=1):
        return self.ask(2, node, struct.pack("<Q", count), 0, queue=0)

def fs():
    def start(form):
        f = Fuse()
        return f, form + ALL + f.init()
    made = lambda which, form: deed(10, which, form)
    gone = lambda which: deed(11, which, 0)
    attributes = struct.pack("<IIQ", 0, 0, 0)

    f, out = start(b"\0")
    out += f.create(b"a\0") + f.write(2, 0, 0, 513) + f.read(2, 0) + f.ask(3, 2, attributes) + f.ask(3, 2, struct.pack("<IIQ", 1, 0, 0))
    out += f.set(2, 0x1b9, 100) + f.set(2, 0x48, 4) + f.sync(2, 0) + f.seek(2, 0, 4) + f.seek(2, 0, 3) + f.space(2, 0, 4096, 0) + f.space(2, 0, 4096, 3)
    out += f.open(2, 0o2001) + f.write(2, 1, 0, 20) + f.open(2, 0o1000) + f.read(2, 2) + f.close(2, 1) + ROUND + f.read(2, 0)
    put("virtio_fs", "file", out + f.ask(10, 1, b"a\0") + f.close(2, 0) + f.read(2, 0) + f.forget(2) + f.ask(3, 2, attributes))

    f, out = start(b"\0")
    out += f.ask(9, 1, struct.pack("<II", 0o755, 0) + b"a\0") + f.ask(8, 1, struct.pack("<IIII", 0o100644, 0, 0, 0) + b"b\0")
    out += f.ask(6, 2, b"l\0../b\0") + f.ask(5, 4, room=4096) + f.ask(13, 2, struct.pack("<Q", 3) + b"h\0") + f.ask(12, 1, struct.pack("<Q", 2) + b"b\0b\0")
    out += f.ask(45, 2, struct.pack("<QII", 2, 2, 0) + b"b\0l\0") + f.ask(45, 2, struct.pack("<QII", 2, 1, 0) + b"b\0h\0") + f.ask(11, 1, b"a\0")
    out += b"".join(f.ask(10, 2, name) for name in [b"b\0", b"l\0", b"h\0"]) + f.ask(11, 1, b"a\0") + f.ask(17, 1) + f.ask(1, 1, b"a\0")
    put("virtio_fs", "names", out + f.ask(9, 1, struct.pack("<II", 0o2755, 0) + b"a\0") + DAMAGE + f.ask(36, 0, struct.pack("<Q", 1), 0) + f.ask(1, 1, b"a\0") + RESET + f.init() + f.ask(1, 1, b"a\0"))

    f, out = start(b"\0")
    out += b"".join(made(n, n) for n in range(8)) + f.open(1, 0, 27) + f.read(1, 0, 0, 4096, 28) + f.read(1, 0, 0, 4096, 44) + f.read(1, 0, 0, 496, 44, 512)
    out += f.sync(1, 0, 30) + f.ask(42, 0, struct.pack("<IIQQQQ", 2, 0, 2, 1, 3, 2), 0, queue=0) + f.read(1, 0, 7, 4096, 28) + f.close(1, 0, 29)
    put("virtio_fs", "lists", out + f.read(1, 0, 0, 4096, 28) + f.ask(38, 0) + f.init() + f.open(1, 0, 27) + f.read(1, 0, 0, 65536, 44, 65536))

    f, out = start(b"\0")
    out += made(0, 0x93) + made(1, 4) + made(2, 6) + made(3, 7) + b"".join(f.ask(1, 1, name + b"\0") for name in [b"a", b"b", b"c", b"d"])
    out += f.open(2) + f.write(2, 0, 0, 12) + f.open(5) + f.open(4) + f.ask(5, 4) + gone(0) + made(0, 7) + f.open(2, 0o1001) + f.set(2, 8) + ROUND + f.ask(1, 1, b"a\0")
    put("virtio_fs", "others", out + deed(12, 1, 2) + f.create(b"x\0", node=3) + gone(1) + made(1, 6) + f.create(b"b\0") + f.ask(1, 3, b"x\0") + f.ask(3, 3, attributes))

    f, out = start(b"\1")
    out += made(0, 0x90) + f.ask(1, 1, b"a\0") + f.open(2, 0) + f.read(2, 0) + f.open(2) + f.open(2, 0o1000) + f.set(2, 8) + f.write(2, 0, 0, 12) + f.space(2, 0, 1, 3)
    put("virtio_fs", "read-only", out + f.create(b"a\0") + f.ask(10, 1, b"a\0") + f.ask(99, 1) + submit(1, request(b"short", 0, 20), request(b"", 0, 0), request(bytes(40), 0, 13)))

def vsock():
    RECEIVE, TRANSMIT, EVENTS = range(3)
    REQUEST, RESPONSE, RST, SHUTDOWN, RW, UPDATE, ASK = range(1, 8)
    FIRST = 1 << 30
    def packet(op, guest, host, more=0, flags=0, room=65536, forwarded=0, cid=2, kind=1):
        head = struct.pack("<QQIIIHHIII", 3, cid, guest, host, more, kind, op, flags, room, forwarded)
        return submit(TRANSMIT, request(head, more))
    room = submit(RECEIVE, *[request(room=4096)] * 4)
    listen = lambda port: deed(10, port, 0)
    begin = lambda port: deed(10, port, 2)
    push = lambda stream, length: deed(11, stream, LENGTHS.index(length) << 4)
    end = lambda stream, how, length=0: deed(12, stream, LENGTHS.index(length) << 4 | how)
    FINISH, HANG_UP, HOLD, RELEASE = range(4)

    out = ALL + room + listen(5) + packet(REQUEST, 1, 5) + packet(RW, 1, 5, 513) + push(0, 4096) + room + packet(ASK, 1, 5) + packet(UPDATE, 1, 5, forwarded=4096)
    out += packet(SHUTDOWN, 1, 5, flags=1) + packet(RW, 1, 5, 20) + end(0, FINISH) + room + packet(SHUTDOWN, 1, 5, flags=2) + packet(RW, 1, 5, 20)
    put("virtio_vsock", "from-the-guest", out + room + packet(REQUEST, 1, 6) + packet(RST, 1, 6) + packet(REQUEST, 1, 5, kind=2) + packet(REQUEST, 1, 5, cid=7) + room)
    out = ALL + begin(7) + room + packet(RESPONSE, 7, FIRST) + push(0, 65536) + room + room + packet(UPDATE, 7, FIRST, room=100, forwarded=4000) + push(0, 4096)
    out += room + room + packet(UPDATE, 7, FIRST, room=65536, forwarded=8000) + room + end(0, HANG_UP) + room + begin(8) + room + packet(RST, 8, FIRST + 1)
    put("virtio_vsock", "from-outside", out + begin(9) + room + end(0, HANG_UP) + room + packet(RESPONSE, 9, FIRST + 2) + room)
    out = ALL + submit(EVENTS, request(room=4), request(room=13)) + room + listen(5) + packet(REQUEST, 1, 5) + end(0, HOLD)
    out += packet(RW, 1, 5, 4096) * 12 + packet(ASK, 1, 5) + room + end(0, RELEASE, 65536) + room + packet(RW, 1, 5, 4096) * 20 + room
    put("virtio_vsock", "stalled", out + ROUND + packet(RW, 1, 5, 1) + room + begin(3) + DAMAGE + submit(EVENTS, request(room=2), request(room=4)) + RESET + room + begin(3))
    many = b"".join(packet(REQUEST, n, 5) + push(n, 12) for n in range(8))
    put("virtio_vsock", "many", ALL + listen(5) + many + begin(1) + begin(2) + room * 4 + deed(5, 0, 3, 0) + packet(RW, 3, 5, 496, room=0) + push(3, 496) + room * 2 + submit(RECEIVE, request(room=20), request(room=0)) + room)

def sparse(data):
    """The form of Input::sparse: pieces of a file that is mostly zeroes."""
    out, at = b"", 0
    while at < len(data):
        if not any(data[at:at + 8]):
            at += 8
            continue
        end = at
        while end < len(data) and end - at < 248 and any(data[end:end + 16]):
            end += 8
        piece = data[at:end].rstrip(b"\0")
        out += struct.pack("<HB", at // 8, len(piece)) + piece
        at = end
    return out + struct.pack("<HB", len(data) // 8, 0)

def qcow2():
    deeds = bytes([9, 0, 0, 64, 8, 1, 8, 5, 0, 3, 16, 0, 0, 40, 3, 4, 16, 9, 2, 0, 0, 0, 3, 100, 4, 5, 0, 0, 1, 30, 30])
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        def make(name, flags, options, size="256K", writes=(), more=()):
            run = lambda *line: subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
            run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *more, "i.qcow2", size)
            for write in writes:
                run("qemu-io", "-f", "qcow2", "-c", write, "i.qcow2")
            with open("i.qcow2", "rb") as image:
                put("qcow2", name, bytes([flags]) + deeds + sparse(image.read()))
        run = lambda *line: subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        run("truncate", "-s", "64K", "base.raw")
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "base.qcow2", "64K")
        small = "cluster_size=512"
        make("empty", 0, small)
        make("written", 0, small, writes=["write -P 7 0 1k", "write -P 8 32k 512", "write -z 40k 1k", "discard 0 512"])
        make("large-clusters", 0, "cluster_size=64k", writes=["write -P 0 0 1k"])
        make("version-2", 0, "compat=0.10,cluster_size=4k", writes=["write -P 0 8k 512"])
        make("one-bit-counts", 0, "refcount_bits=1,cluster_size=1k", writes=["write -P 9 0 512"])
        make("wide-counts", 0, "refcount_bits=64,cluster_size=512", writes=["write -P 9 0 512"])
        make("on-raw", 2, small, more=["-F", "raw", "-b", "base.raw"], writes=["write -P 1 4k 512"])
        make("on-qcow2", 4, small, more=["-F", "qcow2", "-b", "base.qcow2"])
        make("read-only", 1, small, writes=["write -P 7 0 512"])
        make("compressed", 0, "cluster_size=4k", writes=["write -c -P 5 0 4k", "write -c -P 6 8k 4k"])

def kernels():
    fixtures = os.path.join(HERE, "../plugins/personalities/linux/tests/fixtures")
    read = lambda name: open(os.path.join(fixtures, name), "rb").read()
    elf = read("kernel.elf")
    put("linux_kernel", "elf", bytes([0, 4]) + sparse(elf))
    put("linux_kernel", "elf-64", bytes([2, 0x85]) + sparse(elf))
    put("flat_kernel", "elf", b"\0\0" + sparse(elf))
    put("flat_kernel", "raw", b"\0\0" + sparse(b"\xeb\xfe" * 40))
    put("flat_kernel", "long", b"\3\0" + sparse(b"\xeb\xfe" * 40))
    # A 32-bit image: one segment at 1 MiB, and its entry.
    elf32 = b"\x7fELF" + bytes([1, 1, 1]) + bytes(9) + struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, 0x100000, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    elf32 += struct.pack("<IIIIIIII", 1, 84, 0x100000, 0x100000, 4, 0x2000, 5, 4096) + b"\xeb\xfe\0\0"
    put("flat_kernel", "elf-32", b"\0\0" + sparse(elf32))
    put("linux_kernel", "elf-32", bytes([3, 0x40]) + sparse(elf32))
    for name in ["gzip", "xz", "zstd", "lz4", "lzma"]:
        payload = read("payload." + name)
        code = (0x400 + len(payload) + 15) // 16 * 16
        image = bytearray(1024 + code)
        image[1024 + 0x400:1024 + 0x400 + len(payload)] = payload
        for at, form, value in [
            (0x1f1, "B", 1), (0x1f4, "<I", code // 16), (0x1fe, "<H", 0xaa55), (0x200, "<H", 0x6aeb), (0x202, "4s", b"HdrS"), (0x206, "<H", 0x20f),
            (0x20e, "<H", 0x100), (0x211, "B", 1), (0x214, "<I", 1 << 20), (0x22c, "<I", 0x7fffffff), (0x230, "<I", 0x200000), (0x234, "B", 1), (0x236, "<H", 1),
            (0x238, "<I", 2047), (0x248, "<I", 0x400), (0x24c, "<I", len(payload)), (0x258, "<Q", 16 << 20), (0x260, "<I", 0x200000), (0x300, "6s", b"6.1.0\0"),
        ]:
            struct.pack_into(form, image, at, value)
        put("linux_kernel", name, bytes([0, 4]) + sparse(bytes(image)))
        if name == "gzip":
            put("linux_kernel", "packed-64", bytes([2, 4]) + sparse(bytes(image)))
            put("linux_kernel", "packed-32", bytes([3, 4]) + sparse(bytes(image)))

for make in [blk, net, console, rng, balloon, fs, vsock, qcow2, kernels]:
    make()
