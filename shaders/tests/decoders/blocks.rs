//! Every `dequantize_*` of a type of blocks.

use nemoconv_device::{Device, can_dequantize, kernels};
use nemoconv_formats::{GgmlType, block};

use super::{HALVES, Random, assert_same};
use crate::drivers;

/// Odd, and more than the values of a byte.
const BLOCKS: usize = 515;

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

/// Random blocks, a third of them with special scales; scales of one byte take every value.
fn blocks(ty: GgmlType) -> Vec<u8> {
    let mut random = Random::new(u64::from(ty.id()));
    let mut bytes = random.bytes(BLOCKS * ty.block_bytes());
    for (i, block) in bytes.chunks_mut(ty.block_bytes()).enumerate() {
        match ty {
            GgmlType::MXFP4 => block[0] = i as u8,
            GgmlType::NVFP4 => block[i % 4] = i as u8,
            _ => {}
        }
        if i % 3 == 0 {
            for at in halves(ty) {
                block[*at..at + 2].copy_from_slice(&random.one_of(&HALVES).to_le_bytes());
            }
        }
    }
    bytes
}

fn check(name: &str, device: &Device, ty: GgmlType) {
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
        assert_eq!(found.pop(), Some(77.0), "{name}, {ty}: the value behind");
        let what = format!("{name}, {ty} from byte {first_byte}");
        assert_same(&what, &found, &expected);
    }
}

#[test]
fn every_type_as_formats_decodes_it() {
    for (name, device) in drivers::all() {
        for ty in kernels::decoded_types() {
            check(&name, &device, *ty);
        }
    }
}

#[test]
fn every_half() {
    let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let mut expected = vec![0.0; bytes.len() / 2];
    block::dequantize(GgmlType::F16, &bytes, &mut expected).unwrap();
    for (name, device) in drivers::all() {
        let bytes = device.upload_bytes(&bytes).unwrap();
        let mut out = device.zeros(expected.len()).unwrap();
        device
            .dequantize(GgmlType::F16, &bytes, 0, expected.len(), &mut out)
            .unwrap();
        let found = device.download(&out, 0..out.len()).unwrap();
        assert_same(&name, &found, &expected);
    }
}

#[test]
fn devices_decode_what_formats_decodes() {
    for ty in GgmlType::all() {
        let (bytes, mut out) = (vec![0; ty.block_bytes()], vec![0.0; ty.block_elements()]);
        let is_decoded = block::dequantize(ty, &bytes, &mut out).is_ok();
        // Types of activations, which no file holds.
        let is_of_inputs = matches!(ty, GgmlType::Q8_1 | GgmlType::Q8_K);
        assert_eq!(can_dequantize(ty), is_decoded && !is_of_inputs, "{ty}");
    }
}
