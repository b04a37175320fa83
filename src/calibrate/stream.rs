//! The residual streams of all cells between two blocks: on the machine that runs them, in memory or, where they do not fit, in
//! a file.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::backend::{Backend, Machine, MachineBuffer};
use crate::error::{Error, Fault, Result};

/// One array `[tokens, hidden]` per cell.
#[derive(Debug)]
pub struct Streams {
    storage: Storage,
    /// Values of each cell.
    lengths: Vec<usize>,
}

#[derive(Debug)]
enum Storage {
    Memory(Vec<Vec<f32>>),
    /// Cells one after the other.
    File(File),
}

impl Streams {
    /// Zeros. `in_file` keeps them in a nameless temporary file.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn new(lengths: Vec<usize>, in_file: bool) -> Result<Self> {
        let storage = match in_file {
            false => Storage::Memory(lengths.iter().map(|len| vec![0.0; *len]).collect()),
            true => Storage::File(file_of_zeros(lengths.iter().sum()).map_err(failed)?),
        };
        Ok(Self { storage, lengths })
    }

    /// The streams of a cell.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read(&self, cell: usize) -> Result<Vec<f32>> {
        match &self.storage {
            Storage::Memory(cells) => Ok(cells[cell].clone()),
            Storage::File(file) => {
                let mut values = vec![0.0; self.lengths[cell]];
                let bytes = bytemuck::cast_slice_mut(&mut values);
                file.read_exact_at(bytes, self.offset(cell))
                    .map_err(failed)?;
                Ok(values)
            }
        }
    }

    /// Replaces the streams of a cell.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&mut self, cell: usize, values: Vec<f32>) -> Result<()> {
        assert_eq!(values.len(), self.lengths[cell]);
        let offset = self.offset(cell);
        match &mut self.storage {
            Storage::Memory(cells) => cells[cell] = values,
            Storage::File(file) => {
                let bytes = bytemuck::cast_slice(&values);
                file.write_all_at(bytes, offset).map_err(failed)?;
            }
        }
        Ok(())
    }

    fn offset(&self, cell: usize) -> u64 {
        4 * self.lengths[..cell].iter().sum::<usize>() as u64
    }
}

/// The same for a machine: there while they leave it room, which on the CPU is this computer's memory.
pub struct MachineStreams {
    machine: Machine,
    place: Place,
}

enum Place {
    Machine(Vec<MachineBuffer>),
    Here(Streams),
}

impl MachineStreams {
    /// Zeros. `in_file` keeps those that do not lie on a device in a nameless temporary file.
    ///
    /// # Errors
    /// The file cannot be made; the machine fails.
    pub fn new(machine: Machine, lengths: Vec<usize>, in_file: bool) -> Result<Self> {
        let place = match machine.kept_zeros(&lengths)? {
            Some(cells) => Place::Machine(cells),
            None => Place::Here(Streams::new(lengths, in_file)?),
        };
        Ok(Self { machine, place })
    }

    /// A copy of the streams of a cell.
    ///
    /// # Errors
    /// The file cannot be read; the machine fails.
    pub fn read(&self, cell: usize) -> Result<MachineBuffer> {
        match &self.place {
            Place::Machine(cells) => self.machine.duplicate(&cells[cell]),
            Place::Here(streams) => self.machine.upload(streams.read(cell)?),
        }
    }

    /// Replaces the streams of a cell.
    ///
    /// # Errors
    /// The file cannot be written; the machine fails.
    pub fn write(&mut self, cell: usize, stream: MachineBuffer) -> Result<()> {
        match &mut self.place {
            Place::Machine(cells) => {
                assert_eq!(self.machine.len(&stream), self.machine.len(&cells[cell]));
                cells[cell] = stream;
                Ok(())
            }
            Place::Here(streams) => streams.write(cell, self.machine.download_all(stream)?),
        }
    }

    /// The same with values of this computer.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_values(&mut self, cell: usize, values: Vec<f32>) -> Result<()> {
        let stream = self.machine.upload(values)?;
        self.write(cell, stream)
    }
}

fn file_of_zeros(values: usize) -> std::io::Result<File> {
    let file = tempfile::tempfile()?;
    file.set_len(4 * values as u64)?;
    Ok(file)
}

fn failed(source: std::io::Error) -> Error {
    let what = "cannot keep residual streams in a temporary file";
    Error::Write {
        fault: Fault::new(what)
            .hint("set TMPDIR to a folder with room, or allow more memory with `--max-ram`"),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_come_back_from_memory_and_file() {
        for in_file in [false, true] {
            let mut streams = Streams::new(vec![2, 0, 3], in_file).unwrap();
            assert_eq!(streams.read(2).unwrap(), [0.0; 3]);
            streams.write(2, vec![3.0, 4.0, 5.0]).unwrap();
            streams.write(0, vec![1.0, 2.0]).unwrap();
            streams.write(1, vec![]).unwrap();
            assert_eq!(streams.read(0).unwrap(), [1.0, 2.0]);
            assert_eq!(streams.read(1).unwrap(), [0.0; 0]);
            assert_eq!(streams.read(2).unwrap(), [3.0, 4.0, 5.0]);
        }
    }
}
