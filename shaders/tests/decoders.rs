//! Every `dequantize_*` against the decoders of `formats`, bit for bit.

mod present;

use nemoconv_device::{Device, kernels};
use nemoconv_formats::{GgmlType, block};
use present::{Random, assert_same, on_every_device};

/// Odd, and more than the values of a byte.
const BLOCKS: usize = 515;

/// F16: zeros, subnormal numbers, infinities, NaN, the largest, the smallest normal ones, 1 and -1.
const HALVES: [u16; 15] = [
    0x0000, 0x8000, 0x0001, 0x8001, 0x03ff, 0x83ff, 0x7c00, 0xfc00, 0x7e00, 0xfdff, 0x7bff, 0xfbff,
    0x0400, 0x3c00, 0xbc00,
];

/// Where blocks have F16 scales.
fn halves(ty: GgmlType) -> &'static [usize] {
    match ty {
        GgmlType::F32 | GgmlType::BF16 | GgmlType::MXFP4 | GgmlType::NVFP4 => &[],
        GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4_K | GgmlType::Q5_K => &[0, 2],
        GgmlType::Q2_K => &[80, 82],
        GgmlType::Q3_K => &[108],
        GgmlType::Q6_K => &[208],
        GgmlType::TQ1_0 => &[52],
        GgmlType::TQ2_0 => &[64],
        _ => &[0],
    }
}

/// Random blocks, a third of them with special scales; those of one byte take every value.
fn blocks(ty: GgmlType) -> Vec<u8> {
    let mut random = Random::new(u64::from(ty.id()) + 1);
    let mut bytes = random.bytes(BLOCKS * ty.block_bytes());
    for (i, block) in bytes.chunks_mut(ty.block_bytes()).enumerate() {
        match ty {
            GgmlType::MXFP4 => block[0] = i as u8,
            GgmlType::NVFP4 => block[i % 4] = i as u8,
            _ => {}
        }
        if i % 3 != 0 {
            continue;
        }
        for at in halves(ty) {
            let half = HALVES[random.bits() as usize % HALVES.len()];
            block[*at..at + 2].copy_from_slice(&half.to_le_bytes());
        }
    }
    bytes
}

fn check(device: &Device, ty: GgmlType) {
    let stored = blocks(ty);
    let mut expected = vec![0.0; BLOCKS * ty.block_elements()];
    block::dequantize(ty, &stored, &mut expected).unwrap();
    // Blocks of an odd size are aligned to nothing.
    let odd = ty.block_bytes() % 2;
    for first_byte in [0, 6 + odd, 262 + odd] {
        let bytes = [vec![0xaa; first_byte], stored.clone(), vec![0xbb; 3]].concat();
        let bytes = device.upload_bytes(&bytes).unwrap();
        let mut out = device.upload(&vec![77.0; expected.len() + 1]).unwrap();
        device
            .dequantize(ty, &bytes, first_byte as u64, expected.len(), &mut out)
            .unwrap();
        let mut found = device.download(&out, 0..out.len()).unwrap();
        assert_eq!(found.pop(), Some(77.0), "{ty}: the value behind");
        assert_same(&format!("{ty} from byte {first_byte}"), &found, &expected);
    }
}

#[test]
fn every_type_as_formats_decodes_it() {
    on_every_device(|device| kernels::decoded_types().iter().for_each(|ty| check(device, *ty)));
}

#[test]
fn every_half() {
    let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let mut expected = vec![0.0; bytes.len() / 2];
    block::dequantize(GgmlType::F16, &bytes, &mut expected).unwrap();
    on_every_device(|device| {
        let bytes = device.upload_bytes(&bytes).unwrap();
        let mut out = device.zeros(expected.len()).unwrap();
        device
            .dequantize(GgmlType::F16, &bytes, 0, expected.len(), &mut out)
            .unwrap();
        let found = device.download(&out, 0..out.len()).unwrap();
        assert_same("F16", &found, &expected);
    });
}

#[test]
fn whatever_formats_decodes_a_device_does() {
    for ty in GgmlType::all() {
        let (bytes, mut out) = (vec![0; ty.block_bytes()], vec![0.0; ty.block_elements()]);
        let is_decoded = block::dequantize(ty, &bytes, &mut out).is_ok();
        // Those are types of activations, which no file holds.
        let is_of_activations = matches!(ty, GgmlType::Q8_1 | GgmlType::Q8_K);
        let expected = is_decoded && !is_of_activations;
        assert_eq!(nemoconv_device::can_dequantize(ty), expected, "{ty}");
    }
}
