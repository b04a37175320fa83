// What rows of packed checkpoints have in common. A kernel declares the words of `scales`.

// The row of a checkpoint that stands in a place: of each head of `head_rows` rows the second half lies between the first.
// 0: all rows stay. Twin: `interleaved` in src/convert/tile.rs.
fn source_row(place: u32, head_rows: u32) -> u32 {
    if head_rows == 0u {
        return place;
    }
    let at = place % head_rows;
    return place - at + at % 2u * (head_rows / 2u) + at / 2u;
}

// F8_E4M3, twin of `from_fields` in formats/src/float.rs.
fn e4m3(byte: u32) -> f32 {
    let magnitude = byte & 0x7fu;
    var bits = (magnitude << 20u) + (120u << 23u);
    if magnitude < 8u {
        bits = bitcast<u32>(f32(magnitude) * (1.0 / 512.0));
    }
    if magnitude == 0x7fu {
        bits = 0x7fc00000u;
    }
    return bitcast<f32>(bits | ((byte & 0x80u) << 24u));
}

// A scale of these types: 0: BF16, 1: F16, 2: F32, 3: F8_E4M3.
fn scale_at(scale_type: u32, first_byte: u32, index: u32) -> f32 {
    if scale_type == 2u {
        return bitcast<f32>(scales[(first_byte >> 2u) + index]);
    }
    if scale_type == 3u {
        let byte = first_byte + index;
        return e4m3((scales[byte >> 2u] >> ((byte & 3u) * 8u)) & 0xffu);
    }
    let byte = first_byte + index * 2u;
    let short = (scales[byte >> 2u] >> ((byte & 2u) * 8u)) & 0xffffu;
    if scale_type == 1u {
        return unpack2x16float(short).x;
    }
    return bitcast<f32>(short << 16u);
}
