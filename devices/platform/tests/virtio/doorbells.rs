//! Doorbells that an engine turns into events.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use tenon_core::{
    EngineError, InterruptController, Lifecycle, QueueDevice, QueueProfile, QueueTransport, RequestQueue,
    Vcpu, Vm,
};

use crate::driver::{Driver, VERSION_1};
use crate::machine::{Controller, TestMachine};

/// An engine of which only ioeventfds work.
#[derive(Default)]
struct Events(Mutex<Vec<(u64, OwnedFd)>>);

const NOT: EngineError = EngineError::Unsupported("such a thing");

impl Vm for Events {
    fn create_vcpu(&self, _: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        Err(NOT)
    }
    fn interrupts(&self) -> Arc<dyn InterruptController> {
        Arc::new(Controller::default())
    }
    fn reset(&self) -> Result<(), EngineError> {
        Err(NOT)
    }
    fn save(&self) -> Result<Vec<u8>, EngineError> {
        Err(NOT)
    }
    fn restore(&self, _: &[u8]) -> Result<(), EngineError> {
        Err(NOT)
    }
    fn set_dirty_log(&self, _: bool) -> Result<(), EngineError> {
        Err(NOT)
    }
    fn take_dirty_log(&self) -> Result<Vec<u64>, EngineError> {
        Err(NOT)
    }
    fn register_ioeventfd(&self, event: BorrowedFd<'_>, address: u64, size: u8) -> Result<(), EngineError> {
        assert_eq!(size, 0);
        self.0.lock().unwrap().push((address, event.try_clone_to_owned().unwrap()));
        Ok(())
    }
    fn unregister_ioeventfd(&self, _: BorrowedFd<'_>, address: u64, _: u8) -> Result<(), EngineError> {
        let mut events = self.0.lock().unwrap();
        let at = events.iter().position(|event| event.0 == address).expect("it was registered");
        events.remove(at);
        Ok(())
    }
}

impl Events {
    fn addresses(&self) -> Vec<u64> {
        self.0.lock().unwrap().iter().map(|event| event.0).collect()
    }

    fn write(&self, address: u64) {
        let events = self.0.lock().unwrap();
        let event = &events.iter().find(|event| event.0 == address).unwrap().1;
        rustix::io::write(event, &1u64.to_ne_bytes()).unwrap();
    }
}

/// Passes on that it was notified.
struct Bell(QueueProfile, std::sync::mpsc::SyncSender<u16>);

impl Lifecycle for Bell {
    fn name(&self) -> &'static str {
        "bell"
    }
    fn reset(&self) {}
    fn save(&self) -> Result<(u32, Vec<u8>), String> {
        Ok((1, Vec::new()))
    }
    fn restore(&self, _: u32, _: &[u8]) -> Result<(), String> {
        Ok(())
    }
}

impl QueueDevice for Bell {
    fn profile(&self) -> &QueueProfile {
        &self.0
    }
    fn read_config(&self, _: u32, _: u8) -> u64 {
        0
    }
    fn write_config(&self, _: u32, _: u8, _: u64) {}
    fn start(&self, _: u64, _: Vec<Option<Box<dyn RequestQueue>>>, _: Arc<dyn QueueTransport>) {}
    fn stop(&self) {}
    fn notify(&self, queue: u16) {
        self.1.send(queue).unwrap();
    }
}

#[test]
fn a_doorbell_that_is_an_event_notifies_the_device_and_follows_the_bar() {
    let events = Arc::new(Events::default());
    let machine = TestMachine::with_vm(1, Some(events.clone()));
    let (sender, receiver) = std::sync::mpsc::sync_channel(16);
    let profile = QueueProfile { device_type: 4, features: 0, queues: vec![8; 3], config_size: 0 };
    let slot = machine.attach("bell", &Arc::new(Bell(profile, sender)));
    let mut driver = Driver::new(&machine, slot);
    let places = |notify: u64| (0..3).map(|n| notify + 4 * n).collect::<Vec<_>>();
    assert_eq!(events.addresses(), places(driver.notify));
    // Before DRIVER_OK nothing is passed on, whichever way it came.
    events.write(driver.notify);
    machine.mmio.write(driver.notify, 2, 0);
    assert!(driver.negotiate(VERSION_1));
    driver.queue(0, 8, 0);
    driver.set_driver_ok();
    for queue in [2, 0, 1] {
        events.write(driver.notify + 4 * queue);
        // The event from before may come first, for its thread is another.
        while u64::from(receiver.recv().unwrap()) != queue {}
    }
    let at = driver.notify - driver.config.bar();
    driver.config.write(0x10, 4, 0xc400_0000);
    driver.config.write(0x14, 4, 0);
    assert_eq!(events.addresses(), places(0xc400_0000 + at));
    events.write(0xc400_0000 + at + 8);
    while receiver.recv().unwrap() != 2 {}
    driver.config.write(4, 2, 0);
    assert!(events.addresses().is_empty());
    driver.config.write(4, 2, 6);
    assert_eq!(events.addresses().len(), 3);
    machine.pci.remove(slot).unwrap();
    assert!(events.addresses().is_empty());
}
