//! Streams, events and memory of the emulated device.
//!
//! Streams run when they must: when they are waited for, or when another waits for one of their events. Streams that
//! are [eager](Settings::eager) run at once, as far as they can without the others. What waits for too little finds the wrong
//! values; what waits for too much meets a [fault](Settings::fault).

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ffi::{c_int, c_void};
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nemoconv_cuda_emu::{EntryPoint, Order};

use crate::cublas::Gemm;
use crate::{ILLEGAL_ADDRESS, LAUNCH_FAILED, LAUNCH_TIMEOUT, SUCCESS};

/// What the environment asks for, each as `NEMOCONV_LIBCUDA_NAME`.
pub struct Settings {
    /// `DEVICES`: how many there are.
    pub devices: c_int,
    /// `CAPABILITY`: 90 for sm_90.
    pub capability: c_int,
    /// `POOLS`: whether memory can be allocated in the order of a stream.
    pub has_pools: bool,
    /// `MEMORY`: bytes.
    pub memory_bytes: u64,
    /// `PINNED`: bytes of the host that can be pinned.
    pub pinned_bytes: u64,
    /// `EAGER`: 1 for every first stream of three to run at once, 2 for every second one, 4 for every third, or sums of these.
    pub eager: u64,
    /// `BLAS`: whether cuBLAS can be used.
    pub has_blas: bool,
    /// `BROKEN`: whether kernels cannot be launched.
    pub fails_to_launch: bool,
    /// `FAULT`: the launch that fails when it is run, counted from 1.
    pub fault: usize,
    /// `BUSY`: so many waits for events that are not reached last until something else is launched.
    pub busy_waits: u64,
}

impl Settings {
    fn of_environment() -> Self {
        let number = |name: &str, default: u64| {
            let value = std::env::var(format!("NEMOCONV_LIBCUDA_{name}"));
            value.map_or(default, |value| value.parse().expect("a number"))
        };
        Self {
            devices: number("DEVICES", 1) as c_int,
            capability: number("CAPABILITY", 90) as c_int,
            has_pools: number("POOLS", 1) != 0,
            memory_bytes: number("MEMORY", 1 << 32),
            pinned_bytes: number("PINNED", 1 << 32),
            eager: number("EAGER", 0),
            has_blas: number("BLAS", 1) != 0,
            fails_to_launch: number("BROKEN", 0) != 0,
            fault: number("FAULT", 0) as usize,
            busy_waits: number("BUSY", 0),
        }
    }
}

/// Something that a stream does.
pub enum Op {
    /// Memory is there from now on.
    Allocate(u64),
    Free(u64),
    Upload {
        to: u64,
        from: u64,
        bytes: usize,
    },
    Download {
        to: u64,
        from: u64,
        bytes: usize,
    },
    Copy {
        to: u64,
        from: u64,
        bytes: usize,
    },
    Fill {
        to: u64,
        value: u8,
        bytes: usize,
    },
    Kernel {
        entry: &'static EntryPoint,
        grid: [u32; 2],
        threads: u32,
        views: Vec<u64>,
        parameters: Vec<u32>,
    },
    /// A kernel that fails.
    Fault,
    Gemm(Gemm),
    Record(usize, usize),
    Wait(usize, usize),
}

/// What a stream has yet to do.
struct Stream {
    /// Streams created before.
    number: usize,
    queue: VecDeque<Op>,
}

/// An event: the streams that it was recorded in, and how many of those records were reached.
#[derive(Default)]
struct Event {
    streams: Vec<usize>,
    reached: usize,
}

/// Memory of the device, or pinned.
struct Memory {
    words: Vec<u64>,
    bytes: u64,
    /// Its allocation has been reached in the order of its stream.
    is_there: bool,
}

impl Memory {
    fn new(bytes: u64, is_there: bool) -> (u64, Self) {
        // Aligned as the driver's: 256 bytes.
        let mut words = vec![u64::MAX; bytes.div_ceil(8) as usize + 32];
        let address = (words.as_mut_ptr() as u64).next_multiple_of(256);
        (
            address,
            Self {
                words,
                bytes,
                is_there,
            },
        )
    }
}

pub struct World {
    pub settings: Settings,
    /// The first error: every call gives it from then on.
    pub error: c_int,
    pub modules: usize,
    launches: usize,
    /// Handles of cuBLAS: the streams that they were given.
    pub blas: BTreeMap<usize, usize>,
    /// How often the context is held.
    pub contexts: usize,
    streams_created: usize,
    streams: HashMap<usize, Stream>,
    events: HashMap<usize, Event>,
    memories: BTreeMap<u64, Memory>,
    pinned: BTreeMap<u64, Memory>,
    /// Freed and not given back.
    pooled_bytes: u64,
    created: usize,
}

/// The one device of the process.
pub fn world() -> MutexGuard<'static, World> {
    static WORLD: LazyLock<Mutex<World>> = LazyLock::new(|| {
        Mutex::new(World {
            settings: Settings::of_environment(),
            error: SUCCESS,
            modules: 0,
            launches: 0,
            blas: BTreeMap::new(),
            streams: HashMap::new(),
            streams_created: 0,
            contexts: 0,
            events: HashMap::new(),
            memories: BTreeMap::new(),
            pinned: BTreeMap::new(),
            pooled_bytes: 0,
            created: 0,
        })
    });
    WORLD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Something was launched.
static LAUNCHED: Condvar = Condvar::new();

/// How long it takes at most where nothing stands in the way.
const LAUNCH_TIME: Duration = Duration::from_secs(20);

/// Waits for an event as a host does: others call meanwhile.
pub fn wait_for(event: usize) -> c_int {
    let mut world = world();
    if world.error != SUCCESS {
        return world.error;
    }
    if world.settings.busy_waits > 0 && !world.is_over(event) {
        world.settings.busy_waits -= 1;
        let before = world.launches;
        let waited = LAUNCHED.wait_timeout_while(world, LAUNCH_TIME, |w| w.launches == before);
        let (guard, result) = waited.unwrap_or_else(PoisonError::into_inner);
        world = guard;
        if result.timed_out() {
            world.error = LAUNCH_TIMEOUT;
        }
    }
    if world.error == SUCCESS {
        world.synchronize_event(event);
    }
    world.error
}

impl World {
    pub fn handle(&mut self) -> usize {
        self.created += 1;
        self.created
    }

    pub fn create_stream(&mut self) -> usize {
        let handle = self.handle();
        let stream = Stream {
            number: self.streams_created,
            queue: VecDeque::new(),
        };
        self.streams_created += 1;
        self.streams.insert(handle, stream);
        handle
    }

    pub fn destroy_stream(&mut self, stream: usize) {
        self.synchronize(stream);
        self.streams.remove(&stream).expect("a stream");
    }

    pub fn create_event(&mut self) -> usize {
        let handle = self.handle();
        self.events.insert(handle, Event::default());
        handle
    }

    pub fn destroy_event(&mut self, event: usize) {
        self.events.remove(&event).expect("an event");
    }

    pub fn record(&mut self, event: usize, stream: usize) {
        let streams = &mut self.events.get_mut(&event).expect("an event").streams;
        streams.push(stream);
        let record = streams.len();
        self.queue(stream, Op::Record(event, record));
    }

    pub fn wait(&mut self, stream: usize, event: usize) {
        let record = self.events[&event].streams.len();
        self.queue(stream, Op::Wait(event, record));
    }

    pub fn queue(&mut self, stream: usize, op: Op) {
        self.stream(stream).push_back(op);
        if self.settings.eager >> (self.streams[&stream].number % 3) & 1 == 1 {
            self.run(stream, None, false);
        }
    }

    fn stream(&mut self, stream: usize) -> &mut VecDeque<Op> {
        &mut self.streams.get_mut(&stream).expect("a stream").queue
    }

    pub fn synchronize(&mut self, stream: usize) {
        self.run(stream, None, true);
    }

    fn synchronize_event(&mut self, event: usize) {
        let record = self.events[&event].streams.len();
        self.reach(event, record);
    }

    /// Whether everything that was recorded is reached.
    fn is_over(&self, event: usize) -> bool {
        self.is_reached(event, self.events[&event].streams.len())
    }

    /// Queues a kernel, or what takes the place of the one that fails.
    pub fn launch(&mut self, stream: usize, kernel: Op) {
        self.launches += 1;
        LAUNCHED.notify_all();
        match self.launches == self.settings.fault {
            true => self.queue(stream, Op::Fault),
            false => self.queue(stream, kernel),
        }
    }

    fn is_reached(&self, event: usize, record: usize) -> bool {
        self.events[&event].reached >= record
    }

    fn reach(&mut self, event: usize, record: usize) {
        if !self.is_reached(event, record) {
            let stream = self.events[&event].streams[record - 1];
            self.run(stream, Some((event, record)), true);
        }
    }

    /// Runs a stream: to its end or until an event is reached, and the others as far as it needs them, or only alone.
    fn run(&mut self, stream: usize, until: Option<(usize, usize)>, with_others: bool) {
        while until.is_none_or(|(event, record)| !self.is_reached(event, record)) {
            if let Some(Op::Wait(event, record)) = self.stream(stream).front() {
                let (event, record) = (*event, *record);
                if !self.is_reached(event, record) && !with_others {
                    return;
                }
                self.reach(event, record);
            }
            let Some(op) = self.stream(stream).pop_front() else {
                return;
            };
            if let Err(error) = self.perform(op) {
                self.error = error;
            }
        }
    }

    fn perform(&mut self, op: Op) -> Result<(), c_int> {
        match op {
            Op::Allocate(address) => {
                self.memories.get_mut(&address).expect("memory").is_there = true
            }
            Op::Free(address) => {
                self.pooled_bytes += self.memories[&address].bytes;
                self.free(address);
            }
            Op::Upload { to, from, bytes } => {
                check(&self.pinned, from, bytes)?;
                self.check(to, bytes)?;
                move_bytes(to, from, bytes);
            }
            Op::Download { to, from, bytes } => {
                // Else the call would wait for the copy.
                check(&self.pinned, to, bytes)?;
                self.check(from, bytes)?;
                move_bytes(to, from, bytes);
            }
            Op::Copy { to, from, bytes } => {
                self.check(from, bytes)?;
                self.check(to, bytes)?;
                move_bytes(to, from, bytes);
            }
            Op::Fill { to, value, bytes } => {
                self.check(to, bytes)?;
                // SAFETY: so many bytes of memory are there.
                unsafe { (to as *mut u8).write_bytes(value, bytes) };
            }
            Op::Kernel {
                entry,
                grid,
                threads,
                views,
                parameters,
            } => {
                views.iter().try_for_each(|view| self.check(*view, 4))?;
                let mut pointers: Vec<*mut c_void> =
                    views.iter().map(|view| *view as *mut c_void).collect();
                // SAFETY: the arguments were copied by their number and size; views lie in memory that is there.
                let result =
                    unsafe { entry.run(grid, threads, Order::Strided, &mut pointers, &parameters) };
                result.map_err(|_| LAUNCH_FAILED)?;
            }
            Op::Fault => return Err(LAUNCH_FAILED),
            Op::Gemm(gemm) => {
                for (first, bytes) in gemm.ranges() {
                    self.check(first, bytes)?;
                }
                gemm.run();
            }
            Op::Record(event, record) => {
                let event = self.events.get_mut(&event).expect("an event");
                event.reached = event.reached.max(record);
            }
            Op::Wait(..) => {}
        }
        Ok(())
    }

    /// Memory that is there once the stream comes to it, or at once.
    pub fn allocate(&mut self, bytes: u64, stream: Option<usize>) -> Option<u64> {
        let used: u64 = self.memories.values().map(|memory| memory.bytes).sum();
        if used + self.pooled_bytes + bytes > self.settings.memory_bytes {
            return None;
        }
        let (address, memory) = Memory::new(bytes, stream.is_none());
        self.memories.insert(address, memory);
        if let Some(stream) = stream {
            self.queue(stream, Op::Allocate(address));
        }
        Some(address)
    }

    pub fn free(&mut self, address: u64) {
        self.memories.remove(&address).expect("memory");
    }

    pub fn trim(&mut self) {
        self.pooled_bytes = 0;
    }

    pub fn pin(&mut self, bytes: usize) -> Option<*mut u8> {
        let used: u64 = self.pinned.values().map(|memory| memory.bytes).sum();
        if used + bytes as u64 > self.settings.pinned_bytes {
            return None;
        }
        let (address, memory) = Memory::new(bytes as u64, true);
        self.pinned.insert(address, memory);
        Some(address as *mut u8)
    }

    pub fn unpin(&mut self, memory: *mut u8) {
        self.pinned.remove(&(memory as u64)).expect("pinned memory");
    }

    fn check(&self, address: u64, bytes: usize) -> Result<(), c_int> {
        check(&self.memories, address, bytes)
    }

    /// When the context ends, all that was made in it has been given back.
    pub fn release_context(&mut self) {
        self.contexts -= 1;
        if self.contexts > 0 {
            return;
        }
        let left = [
            self.memories.len(),
            self.pinned.len(),
            self.streams.len(),
            self.events.len(),
            self.modules,
            self.blas.len(),
        ];
        assert_eq!(
            left, [0; 6],
            "memory, pinned memory, streams, events, modules, handles of cuBLAS are left"
        );
    }
}

fn check(memories: &BTreeMap<u64, Memory>, address: u64, bytes: usize) -> Result<(), c_int> {
    let (first, memory) = memories
        .range(..=address)
        .next_back()
        .ok_or(ILLEGAL_ADDRESS)?;
    debug_assert!(!memory.words.is_empty());
    let is_within = address + bytes as u64 <= first + memory.bytes;
    (is_within && memory.is_there)
        .then_some(())
        .ok_or(ILLEGAL_ADDRESS)
}

fn move_bytes(to: u64, from: u64, bytes: usize) {
    // SAFETY: both sides were checked, or are memory of the caller that the call names.
    unsafe { (from as *const u8).copy_to(to as *mut u8, bytes) };
}
