// Rows of bytes to where they start at multiples of 16 bytes, with zeros between them.

// Host twin: `pad_rows` in `pad.rs`.
struct Pad {
    uint k;
    uint from_stride, to_stride;
};

// A group has a row.
kernel void pad_rows(PLACE, constant Pad& args [[buffer(0)]], device const uchar* from [[buffer(1)]],
                     device uchar* to [[buffer(2)]]) {
    for (uint i = thread_index; i < args.to_stride; i += threads) {
        to[ulong(group) * args.to_stride + i] = i < args.k ? from[ulong(group) * args.from_stride + i] : 0;
    }
}
